"""The spec: what is valid survives YAML, what is not fails with the path of its key."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.cluster.spec.spec import Spec, load_spec, parse_spec
from moesaic.cluster.spec.text import bytes_of
from moesaic.proto.errors import SpecError
from tests.helpers.paths import ROOT

# ---- any valid spec -----------------------------------------------------------------------------

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True)
MODEL_NAMES = NAMES | st.from_regex(
    r"[A-Za-z0-9][A-Za-z0-9._:-]{0,20}/[A-Za-z0-9][A-Za-z0-9._:-]{0,20}", fullmatch=True
)
ORIGINS = st.from_regex(
    r"(https?|app)://[a-z0-9][a-z0-9.-]{0,20}(:[1-9][0-9]{3,4})?", fullmatch=True
)
HOSTS = st.from_regex(
    r"[a-z0-9]([a-z0-9.-]{0,20}[a-z0-9])?", fullmatch=True
) | st.ip_addresses().map(str)
# Any text that YAML can carry, so that quoting is tested too.
TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
AMOUNTS = st.floats(0, 1000) | st.integers(0, 64)
SECONDS = st.floats(1e-3, 86_400)
DEVICES = st.sampled_from(["auto", "cpu", "cuda", "cuda:3"])
THREADS = st.integers(1, 256) | st.just("auto")


def with_a_card(part: dict[str, Any]) -> dict[str, Any]:
    """Leave the limit of a GPU's memory out where there is none."""
    return {k: v for k, v in part.items() if k != "gpu_memory" or part.get("device") != "cpu"}


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any subset of the keys: each has a default."""
    return st.fixed_dictionaries({}, optional=fields)


RESOURCES: dict[str, st.SearchStrategy[Any]] = {
    "num_cpus": AMOUNTS,
    "num_gpus": AMOUNTS,
    "gpu_memory": st.none() | st.floats(0.01, 1) | st.sampled_from(["20GB", "512 MiB"]),
    "resources": st.dictionaries(TEXTS, AMOUNTS, max_size=2),
    "labels": st.dictionaries(TEXTS, TEXTS, max_size=2),
}
ROWS = st.lists(st.integers(1, 65_536), min_size=3, max_size=3).map(sorted)
GROUPS = st.builds(
    lambda group, rows: (
        with_a_card(group)
        | dict(zip(("max_rows", "max_batch_rows", "max_queue_rows"), rows, strict=True))
    ),
    some(
        **RESOURCES,
        count=st.integers(1, 9),
        cost_per_hour=st.floats(0.01, 100),
        device=DEVICES,
        threads=THREADS,
        placement_group=st.sampled_from(["none", "PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]),
    ),
    ROWS,
)


@st.composite
def valid_values(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.lists(GROUPS, min_size=1, max_size=3))
    hosts = sum(group.get("count", 2) for group in groups)
    models = [
        {"name": name, "path": draw(TEXTS)}
        | draw(
            some(
                dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
                replicas=st.integers(1, hosts),
                exact=st.booleans(),
            )
        )
        for name in draw(st.lists(MODEL_NAMES, max_size=3, unique=True))
    ]
    own = {model["name"] for model in models}
    for model in models[:1]:
        others = MODEL_NAMES.filter(lambda name: name not in own)
        model["aliases"] = draw(st.lists(others, max_size=2, unique=True))
    rest = draw(
        some(
            name=NAMES,
            ray=some(address=st.sampled_from(["local", "auto", "head.example:6379", "[::1]:6379"])),
            network=some(bind=TEXTS, transport=st.sampled_from(["auto", "shm", "grpc", "group"])),
            trunk=some(
                **RESOURCES,
                device=DEVICES,
                threads=THREADS,
                max_requests=st.integers(1, 4096),
                max_waiting=st.integers(0, 1 << 20),
                max_batch_tokens=st.integers(1, 1 << 20),
                cache_tokens=st.integers(64, 1 << 28),
            ).map(with_a_card),
            endpoint=st.none()
            | some(
                host=TEXTS,
                port=st.integers(0, 65_535),
                cors_origins=st.just(["*"]) | st.lists(ORIGINS, max_size=2),
                allowed_hosts=st.just(["*"]) | st.lists(HOSTS, max_size=2),
                limits=some(
                    body_s=SECONDS,
                    bodies_mb=st.floats(8.0, 1 << 20),
                    min_priority=st.integers(-(2**31), 0),
                    max_priority=st.integers(0, 2**31 - 1),
                ),
            ),
            monitoring=st.none() | some(host=TEXTS, port=st.integers(0, 65_535)),
            router=st.none() | some(host=TEXTS, port=st.integers(0, 65_535), call_s=SECONDS),
            autoscale=some(
                up_after_s=SECONDS,
                down_after_s=SECONDS,
                cooldown_s=SECONDS,
                pending_s=SECONDS,
                max_cost_per_hour=st.none() | st.floats(0.01, 1000),
            ),
            timeouts=some(expert_s=SECONDS, attempt_s=SECONDS, start_s=SECONDS),
        )
    )
    return {"hosts": groups, "models": models, **rest}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(values=valid_values())
def test_any_valid_spec_round_trips_through_yaml(values: dict[str, Any]) -> None:
    spec = parse_spec(yaml.safe_load(yaml.safe_dump(values)))
    again = parse_spec(yaml.safe_load(yaml.safe_dump(spec.model_dump(mode="json"))))
    assert again == spec
    for name, asked in values.items():
        assert _given_part(getattr(spec, name), asked) == asked


def _given_part(parsed: Any, asked: Any) -> Any:
    """What a parsed value says of the keys that were given."""
    if isinstance(asked, dict):
        if isinstance(parsed, dict):
            return parsed
        return {key: _given_part(getattr(parsed, key), value) for key, value in asked.items()}
    if isinstance(asked, list):
        return [_given_part(one, value) for one, value in zip(parsed, asked, strict=True)]
    return parsed


def parts(value: Any, path: str = "") -> list[tuple[str, dict[str, Any]]]:
    """(path, values) of every part of a spec's plain values: whatever has fixed keys."""
    found = []
    if isinstance(value, dict) and path.rpartition(".")[2] not in ("resources", "labels"):
        found.append((path, value))
        for key, below in value.items():
            found += parts(below, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for number, below in enumerate(value):
            found += parts(below, f"{path}.{number}")
    return found


@settings(max_examples=150, deadline=None, derandomize=True)
@given(values=valid_values(), data=st.data())
def test_an_unknown_key_at_any_level_fails_with_its_path(
    values: dict[str, Any], data: st.DataObject
) -> None:
    plain = parse_spec(values).model_dump(mode="json")
    every = parts(plain)
    assert len(every) >= 6
    path, part = data.draw(st.sampled_from(every), label="part")
    unknown = data.draw(NAMES.filter(lambda name: name not in part), label="key")
    part[unknown] = data.draw(st.sampled_from([1, None, "x", [], {}]))
    full = f"{path}.{unknown}" if path else unknown
    with pytest.raises(SpecError, match=rf"^spec: {re.escape(full)}: unknown key"):
        parse_spec(plain)


# ---- bad values ---------------------------------------------------------------------------------

MODEL = {"name": "m", "path": "p"}
BAD: list[tuple[dict[Any, Any], str]] = [
    # values, how the message begins
    ({"name": ""}, "name: String should match"),
    (
        {"balance": {"enough": 0.9}},
        "balance.enough: unknown key; it was renamed to rebalance_below",
    ),
    ({"hosts": [{"spread": "PACK"}]}, "hosts.0.spread: unknown key; it was renamed to placement"),
    ({"hosts": [{"gpu_memory": 2}]}, "hosts.0.gpu_memory: expected a fraction in (0, 1], or bytes"),
    ({"trunk": {"gpu_memory": "lots"}}, "trunk.gpu_memory: 'lots' is not a size in bytes"),
    ({"trunk": {"gpu_memory": True}}, "trunk.gpu_memory: expected a fraction"),
    ({"hosts": [{"gpu_memory": 0.5, "device": "cpu"}]}, "hosts.0: gpu_memory limits what is taken"),
    ({"trunk": {"gpu_memory": "1GB", "device": "cpu"}}, "trunk: gpu_memory limits what is taken"),
    ({"balance": {"budget": 2}}, "balance.budget: expected a fraction in (0, 1], or bytes"),
    ({"balance": {"budget": "4 apples"}}, "balance.budget: '4 apples' is not a size in bytes"),
    ({"name": 3}, "name: Input should be a valid string (got 3)"),
    ({"monitoring": {"port": -1}}, "monitoring.port: Input should be greater than or equal to 0"),
    ({"endpoint": {"limits": {"body_s": 0}}}, "endpoint.limits.body_s: Input should be greater"),
    (
        {"endpoint": {"limits": {"body_mb": 65}}},
        "endpoint.limits: body_mb <= bodies_mb must hold: bodies_mb includes each body",
    ),
    (
        {"endpoint": {"limits": {"min_priority": 1}}},
        "endpoint.limits: min_priority <= 0 <= max_priority must hold",
    ),
    ({"router": True}, "router: it has keys of its own, and is no single value (got True)"),
    ({"router": {"port": 65_536}}, "router.port: Input should be less than or equal to 65535"),
    ({"router": {"max_calls": 0}}, "router.max_calls: Input should be greater than"),
    ({"router": {"max_mb": 100.0}}, "router: 2 * max_call_mb <= max_mb must hold"),
    ({"router": {"call_s": 0}}, "router.call_s: Input should be greater than 0"),
    ({"name": "a/b"}, "name: String should match"),
    ({"name": "a\n"}, "name: String should match"),
    ({"name": "x" * 64}, "name: String should match"),
    ({1: 2}, "1: Keys should be strings"),
    ({"models": {"name": "m"}}, "models: Input should be a valid tuple"),
    ({"models": [3]}, "models.0: it has keys of its own, and is no single value"),
    ({"models": [{"name": "m"}]}, "models.0.path: Field required"),
    ({"models": [MODEL, {"path": "p"}]}, "models.1.name: Field required"),
    ({"models": [MODEL | {"name": "../m"}]}, "models.0.name: String should match"),
    ({"models": [MODEL | {"path": ""}]}, "models.0.path: String should have at least 1"),
    ({"models": [MODEL | {"dtype": "int8"}]}, "models.0.dtype: Input should be 'float32', 'bf"),
    ({"models": [MODEL | {"replicas": 0}]}, "models.0.replicas: Input should be greater than"),
    ({"models": [MODEL | {"replicas": 1.5}]}, "models.0.replicas: Input should be a valid integer"),
    ({"models": [MODEL | {"replicas": 3}]}, "models: m wants 3 replicas of each expert on diff"),
    ({"models": [MODEL | {"exact": "maybe"}]}, "models.0.exact: Input should be a valid boolean"),
    ({"models": [MODEL, MODEL]}, "models.1.name: 'm' is taken: models.0.name"),
    *(
        ({"models": [MODEL | {"name": name}]}, "models.0.name: String should match")
        for name in ("a/", "/a", "a//b", "a/../b", "a/.b", "a b", "a#b", "a%2Fb", "a?b")
    ),
    ({"models": [MODEL | {"name": "x" * 129}]}, "models.0.name: String should have at most 128"),
    ({"models": [MODEL | {"updates": ""}]}, "models.0.updates: String should have at least 1"),
    ({"models": [MODEL | {"aliases": "x"}]}, "models.0.aliases: Input should be a valid tuple"),
    ({"models": [MODEL | {"aliases": ["a", "b/"]}]}, "models.0.aliases.1: String should match"),
    ({"models": [MODEL | {"aliases": ["m"]}]}, "models.0.aliases.0: 'm' is taken: models.0.name"),
    (
        {"models": [MODEL | {"aliases": ["a", "a"]}]},
        "models.0.aliases.1: 'a' is taken: models.0.aliases.0",
    ),
    (
        {"models": [MODEL | {"aliases": ["a"]}, MODEL | {"name": "n", "aliases": ["b", "a"]}]},
        "models.1.aliases.1: 'a' is taken: models.0.aliases.0",
    ),
    (
        {"models": [MODEL | {"aliases": ["n"]}, MODEL | {"name": "n"}]},
        "models.1.name: 'n' is taken: models.0.aliases.0",
    ),
    ({"hosts": []}, "hosts: the list is empty"),
    ({"hosts": None}, "hosts: Input should be a valid tuple"),
    ({"hosts": [{}, {"count": 0}]}, "hosts.1.count: Input should be greater than or equal to 1"),
    ({"hosts": [{"count": 5000}]}, "hosts.0.count: Input should be less than or equal to 4096"),
    ({"hosts": [{"count": True}]}, "hosts.0.count: Input should be a valid integer"),
    ({"hosts": [{"count": "3"}]}, "hosts.0.count: Input should be a valid integer"),
    ({"hosts": [{"emulate": {"row_us": True}}]}, "hosts.0.emulate.row_us: "),
    (
        {"hosts": [{"count": 3, "max_count": 2}]},
        "hosts.0: min_count <= count <= max_count must hold",
    ),
    (
        {"hosts": [{"count": 2, "placement_group": "PACK", "max_count": 3}]},
        "hosts.0: placement_group: a placement group has a fixed size",
    ),
    (
        {"autoscale": {"scale_down_below": 0.8, "scale_up_above": 0.5}},
        "autoscale: scale_down_below < scale_up_above must hold",
    ),
    (
        {"trunk": {"min_replicas": 2, "max_replicas": 1}},
        "trunk: min_replicas <= max_replicas must hold",
    ),
    ({"trunk": {"compiled": True}}, "trunk: compiled: true needs engine: vllm"),
    (
        {"models": [{**MODEL, "experts_per_token": 2, "min_experts_per_token": 3}]},
        "models.0: min_experts_per_token <= experts_per_token must hold",
    ),
    ({"models": [{**MODEL, "experts_per_token": 0}]}, "models.0.experts_per_token"),
    ({"models": [{"name": "m", "path": "p", "idle_s": 0}]}, "models.0.idle_s: "),
    ({"autoscale": {"scale_up_above": 1.5}}, "autoscale.scale_up_above: "),
    ({"hosts": [{"device": "gpu"}]}, "hosts.0.device: String should match"),
    ({"hosts": [{"device": "cuda:x"}]}, "hosts.0.device: String should match"),
    ({"hosts": [{"threads": "two"}]}, "hosts.0.threads: Input should be a valid integer"),
    ({"hosts": [{"threads": 0}]}, "hosts.0.threads: Input should be greater than or equal to 1"),
    (
        {"hosts": [{"placement_group": "pack"}]},
        "hosts.0.placement_group: Input should be 'none', 'PACK'",
    ),
    ({"hosts": [{"num_cpus": -1}]}, "hosts.0.num_cpus: Input should be greater than or equal to 0"),
    ({"hosts": [{"num_gpus": float("inf")}]}, "hosts.0.num_gpus: Input should be a finite"),
    ({"hosts": [{"resources": {"a": -1}}]}, "hosts.0.resources.a: Input should be greater"),
    ({"hosts": [{"resources": {"a": {"b": 1}}}]}, "hosts.0.resources.a: Input should be a valid n"),
    ({"hosts": [{"labels": {"zone": 1}}]}, "hosts.0.labels.zone: Input should be a valid string"),
    (
        {"hosts": [{"max_rows": 2048, "max_batch_rows": 1024}]},
        "hosts.0: max_rows <= max_batch_rows <= max_queue_rows",
    ),
    ({"ray": {"address": "nowhere"}}, "ray.address: 'nowhere' is neither 'local', 'auto' nor host"),
    ({"ray": {"address": "head:99999"}}, "ray.address: 'head:99999' is neither"),
    ({"network": {"bind": ""}}, "network.bind: String should have at least 1 character"),
    (
        {"network": {"transport": "tcp"}},
        "network.transport: Input should be 'auto', 'shm', 'grpc', 'group' or 'device'",
    ),
    (
        {"network": {"lending": "always", "transport": "grpc"}},
        "network: lending: 'always' needs shared memory, and transport is 'grpc'; set transport to",
    ),
    (
        {"network": {"lending": "always"}, "hosts": [{"count": 1}, {"emulate": {"call_us": 1}}]},
        "hosts.1.lending: 'always' is not possible: hosts that emulate another device never lend",
    ),
    (
        {"network": {"transport": "grpc"}, "hosts": [{"lending": "always"}]},
        "hosts.0.lending: 'always' is not possible: it needs shared memory, and network.transport",
    ),
    (
        {"hosts": [{"lending": "always", "device": "cuda:1"}], "trunk": {"device": "cpu"}},
        "hosts.0.lending: 'always' is not possible: hosts on cuda:1 lend to trunks on cuda:1, not",
    ),
    ({"hosts": [{"lending": "sometimes"}]}, "hosts.0.lending: Input should be 'never', 'auto' or"),
    ({"trunk": {"engine": "sglang"}}, "trunk.engine: Input should be 'transformers'"),
    ({"trunk": {"cache_tokens": 1}}, "trunk.cache_tokens: Input should be greater than"),
    ({"trunk": {"threads": -1}}, "trunk.threads: Input should be greater than or equal to 1"),
    ({"endpoint": {"port": 65_536}}, "endpoint.port: Input should be less than or equal to 65535"),
    ({"endpoint": {"host": ""}}, "endpoint.host: String should have at least 1 character"),
    ({"endpoint": {"cors_origins": "*"}}, "endpoint.cors_origins: Input should be a valid tuple"),
    ({"endpoint": {"cors_origins": [1]}}, "endpoint.cors_origins.0: Input should be a valid str"),
    *(
        (
            {"endpoint": {"cors_origins": ["http://a", bad]}},
            "endpoint.cors_origins.1: expected an origin",
        )
        for bad in (
            "",
            "a.example",
            "https://",
            "https://a/",
            "https://a/b",
            "HTTPS://a",
            "https://A",
            "https://u@a",
            "https://a:",
            "https://a:0",
            "https://*.a",
            "null",
            "https://ä",
            "a:80",
        )
    ),
    (
        {"endpoint": {"cors_origins": ["https://a:443"]}},
        "endpoint.cors_origins.0: browsers leave out the scheme's default port; remove :443 (got",
    ),
    (
        {"endpoint": {"cors_origins": ["*", "http://a"]}},
        "endpoint: cors_origins: '*' allows all origins; remove the others",
    ),
    ({"timeouts": {"expert_s": 0}}, "timeouts.expert_s: Input should be greater than 0 (got 0)"),
    ({"timeouts": {"attempt_s": float("nan")}}, "timeouts.attempt_s: Input should be a finite"),
    ({"timeouts": {"start_s": "soon"}}, "timeouts.start_s: Input should be a valid number"),
]


@pytest.mark.parametrize(("values", "words"), BAD, ids=[words.split(" ")[0] for _, words in BAD])
def test_bad_values_fail_with_their_path(values: dict[Any, Any], words: str) -> None:
    with pytest.raises(SpecError, match="^my.yaml: " + re.escape(words)):
        parse_spec(values, source="my.yaml")


@pytest.mark.parametrize(
    ("text", "size"),
    [("1B", 1), ("4GB", 4 * 10**9), ("512 MiB", 512 << 20), ("1.5kB", 1500), (" 2TiB ", 2 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert bytes_of(text) == size
    assert parse_spec({"balance": {"budget": text}}).balance.policy.budget_bytes == size


@pytest.mark.parametrize("text", ["", "4", "GB", "-1GB", "0GB", "1e3B", "4GBs", "infB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size in bytes"):
        bytes_of(text)


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(SpecError) as raised:
        parse_spec({"colour": 1, "hosts": [{"count": 0}], "endpoint": {"port": "x"}})
    for path in ("colour: unknown key", "hosts.0.count: ", "endpoint.port: "):
        assert path in str(raised.value)


def test_a_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(SpecError) as raised:
        parse_spec({"name": "!" * 10_000})
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("values", [[], "text", 3, [("name", "x")]])
def test_a_spec_is_a_mapping(values: Any) -> None:
    with pytest.raises(SpecError, match="a mapping is expected"):
        parse_spec(values)


# ---- files --------------------------------------------------------------------------------------

FILES: list[tuple[str, bytes, str]] = [
    ("list", b"- name: x", "a mapping is expected, not list"),
    ("text", b"just text", "a mapping is expected, not str"),
    ("not-yaml", b"a: b: c", "not YAML: mapping values are not allowed here"),
    ("tab", b"\thosts: 1", "not YAML"),
    ("binary", bytes(range(256)), "cannot be read"),
    ("image", b"\x89PNG\r\n\x1a\n\x00", "cannot be read"),
    ("two-documents", b"name: a\n---\nname: b", "not YAML: expected a single document"),
    ("a-key-twice", b"hosts: [{count: 1}]\nhosts: [{count: 2}]", "'hosts' is given twice"),
    ("a-key-twice-below", b"endpoint:\n  port: 1\n  port: 2", "'port' is given twice"),
    ("no-date", b"name: 2001-13-45", "not YAML: month must be"),
    ("huge-number", b"name: " + b"9" * 5000, "not YAML: Exceeds the limit"),
    ("deep", b"[" * 5000, "not YAML: maximum recursion depth"),
    ("code", b"name: !!python/object/apply:os.system [exit]", "not YAML: could not determine"),
    ("unhashable", b"? [a]\n: b", "not YAML"),
    ("recursive", b"name: &a [*a]", "name: Input should be a valid string"),
]


@pytest.mark.parametrize(
    ("content", "words"), [case[1:] for case in FILES], ids=[case[0] for case in FILES]
)
def test_files_that_are_no_spec(content: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_bytes(content)
    with pytest.raises(SpecError, match=re.escape(words)) as raised:
        load_spec(file)
    assert str(raised.value).startswith(f"{file}: ")


@pytest.mark.parametrize("path", ["nothing-here.yaml", "", "a\0b"])
def test_files_that_cannot_be_read(path: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(f"{tmp_path}/{path}")


def test_a_few_lines_that_stand_for_millions_of_values(tmp_path: Path) -> None:
    """Aliases cost nothing, as long as nobody writes them out for the message."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 7)]
    file = tmp_path / "spec.yaml"
    file.write_text("\n".join([*lines, "name: *a6"]))
    tracemalloc.start()
    try:
        with pytest.raises(SpecError, match="name: Input should be a valid string") as raised:
            load_spec(file)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(str(raised.value)) < 3000
    assert peak_bytes < 5e6


def test_an_empty_file_is_a_spec_of_defaults(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("# nothing\n")
    assert load_spec(file) == Spec()


@pytest.mark.parametrize("file", sorted(ROOT.glob("deploy/*.yaml")), ids=lambda file: file.name)
def test_the_specs_that_come_with_the_project(file: Path) -> None:
    assert load_spec(file).models


def test_there_is_a_spec_for_make_up() -> None:
    assert (ROOT / "deploy" / "local.yaml").is_file()


def test_a_group_of_hosts_may_lend_otherwise_than_the_network_says() -> None:
    spec = parse_spec({"hosts": [{}, {"lending": "always"}, {"lending": "never"}]})
    assert [spec.lending_of(group) for group in spec.hosts] == ["auto", "always", "never"]
    assert spec.lends
    assert parse_spec({}).lends
    assert not parse_spec({"network": {"lending": "never"}}).lends
    assert parse_spec({"network": {"lending": "never"}, "hosts": [{"lending": "auto"}]}).lends


def test_what_a_process_may_take_of_its_card() -> None:
    spec = parse_spec({"hosts": [{"num_gpus": 0.3}], "trunk": {"gpu_memory": "20GB"}})
    assert spec.hosts[0].card_share("hosts.0").limit_bytes(10**11) == 3 * 10**10
    assert spec.trunk.card_share("trunk").limit_bytes(10**11) == 2 * 10**10
    half = parse_spec({"trunk": {"gpu_memory": 0.5, "num_gpus": 1}}).trunk
    assert half.card_share("trunk").limit_bytes(10**11) == 5 * 10**10
