"""What is found before anything starts: models, tokenizers, templates, ports, memory, room."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic.actors.preflight import check_machine
from moesaic.actors.preflight.check_machine import machine_memory
from moesaic.actors.preflight.findings import Finding, raise_errors, severity_counts
from moesaic.actors.preflight.preflight import preflight
from moesaic.actors.runtime.ports import check_port
from moesaic.cli.main import main
from moesaic.cluster.spec.spec import Spec, parse_spec
from moesaic.models.folder.tokenizer import read_tokenizer
from moesaic.proto.errors import CheckpointError, ClusterError, UnsupportedModel
from tests.helpers.architectures import tiny_model
from tests.helpers.quantising import FORMS
from tests.helpers.sparse import sparse_deepseek
from tests.helpers.tiny import tiny_mixtral, tiny_tokenizer

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing wrong."""
    folder = tmp_path_factory.mktemp("model") / "whole"
    tiny_mixtral().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may break."""
    return shutil.copytree(whole, tmp_path / "m")


def spec_of(folder: Path | str, **more: Any) -> Spec:
    model = {"name": "m", "path": str(folder), **more.pop("model", {})}
    free = {"endpoint": {"port": 0}, "monitoring": {"port": 0}}
    return parse_spec({"name": "a", "models": [model], **free, **more})


def found(spec: Spec) -> list[tuple[str, str]]:
    return [(one.severity, one.path) for one in preflight(spec).findings]


def only(spec: Spec) -> Finding:
    (one,) = preflight(spec).findings
    return one


def test_nothing_is_found_where_nothing_is_wrong(whole: Path) -> None:
    checked = preflight(spec_of(whole))
    assert checked.findings == []
    assert checked.folders == {"m": whole}
    assert checked.described["m"].layers == {0: 4, 1: 4}


# ---- a model's folder ----------------------------------------------------------------------------


def _write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


def _remove(*names: str) -> Callable[[Path], Any]:
    return lambda folder: [(folder / name).unlink() for name in names]


def _without(tensor: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        del tensors[tensor]
        save_file(tensors, file, metadata={"format": "pt"})

    return change


def _change(name: str, **values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(
            json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values)
        )

    return change


def _lost(name: str) -> Callable[[Path], Any]:
    """A link into a cache whose blob is gone."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("../blobs/gone")

    return change


def _folder(name: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PANICS = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
EMPTY = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
FILES = (
    *("config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
TEMPLATE = "chat_template.jinja"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no-config": (_remove("config.json"), "no config.json"),
    "config": (_write("config.json", "{"), "config.json"),
    "architecture": (_write("config.json", '{"model_type": "llama"}'), "experts"),
    "no-weights": (_remove("model.safetensors"), "neither model.safetensors nor"),
    "truncated": (_write("model.safetensors", "12345678{"), "damaged or truncated"),
    "no-tokenizer": (_remove(*TOKENIZER), "no tokenizer: there is no tokenizer.json"),
    "tokenizer": (_write("tokenizer.json", '{"version": '), "the tokenizer cannot be read: "),
    "tokenizer-of-nothing": (_write("tokenizer.json", "{}"), "the tokenizer cannot be read: "),
    "template": (_write(TEMPLATE, "{% if %}"), "Expected an expression"),
    "template-refuses": (_write(TEMPLATE, "{{ raise_exception('no users') }}"), "no users"),
    "template-fails": (
        _write(TEMPLATE, "{{ messages[7].content + 1 }}"),
        "the chat template fails on a single user message",
    ),
    "template-says-nothing": (_write(TEMPLATE, "<s>"), "leaves out the text of a message"),
    **{f"lost-{file}": (_lost(file), "which does not exist; download") for file in FILES},
    **{f"folder-{file}": (_folder(file), f"{file}: not a file") for file in FILES},
    **{f"null-{file}": (_write(file, "null"), file) for file in FILES[:3]},
    **{f"lfs-{file}": (_write(file, LFS), "a pointer of Git LFS") for file in FILES[2:4]},
    "tokenizer-panics": (
        _change("tokenizer.json", normalizer=PANICS),
        "the tokenizer cannot be read: PanicException",
    ),
    "tokenizer-fails": (
        _change("tokenizer_config.json", model_max_length="x"),
        "the tokenizer fails on 'Hello': TypeError",
    ),
    "tokenizer-of-no-words": (
        _change("tokenizer.json", post_processor=EMPTY),
        "the tokenizer makes no token of 'Hello'",
    ),
    "padding": (_change("config.json", pad_token_id=10**6), "Padding_idx must be within"),
    "activation": (_change("config.json", hidden_act="nope"), "hidden_act: 'nope' is not known"),
    "architectures": (_change("config.json", architectures=3), "architectures: 3 is not a list"),
    "quantization": (_change("config.json", quantization_config="fp8"), "'fp8' is not a mapping"),
    "no-expert": (_change("config.json", num_experts_per_tok=0), "0 experts for each token"),
    "more-experts": (_change("config.json", num_experts_per_tok=5), "a number from 1 to 4"),
    "end-of-text": (
        _change("generation_config.json", eos_token_id=[2, "x"]),
        "eos_token_id: [2, 'x'] is neither",
    ),
    "nested": (_write("generation_config.json", "[" * 200_000), "RecursionError"),
    "generation": (_write("generation_config.json", "[1"), "generation_config.json: cannot be"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_an_error(what: str, folder: Path) -> None:
    change, words = BROKEN[what]
    change(folder)
    one = only(spec_of(folder))
    assert (one.severity, one.path) == ("error", "models.0.path")
    assert words in one.message
    assert "\n" not in one.message
    with pytest.raises((CheckpointError, UnsupportedModel), match=r"models\.0\.path: "):
        raise_errors([one])


@pytest.mark.parametrize("tensor", ["model.norm.weight", "lm_head.weight"])
def test_a_tensor_of_the_trunk_that_is_missing_is_named(tensor: str, folder: Path) -> None:
    _without(tensor)(folder)
    assert tensor in only(spec_of(folder)).message


@pytest.mark.parametrize("architecture", ["qwen3_moe", "olmoe", "dbrx", "switch_transformers"])
def test_tokenizers_that_transformers_makes_of_nothing(architecture: str, tmp_path: Path) -> None:
    tiny_model(architecture).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no tokenizer: there is no tokenizer\.json"):
        read_tokenizer(tmp_path)


def test_without_an_endpoint_nobody_needs_a_tokenizer(folder: Path) -> None:
    _remove(*TOKENIZER)(folder)
    assert found(spec_of(folder, endpoint=None)) == []


def test_a_model_without_a_template_completes(folder: Path) -> None:
    _remove(TEMPLATE)(folder)
    one = only(spec_of(folder))
    assert (one.severity, one.path) == ("warning", "models.0.path")
    assert "/v1/completions works" in one.message


def test_tokens_without_an_embedding(folder: Path, tmp_path: Path) -> None:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    one = only(spec_of(folder))
    assert one.severity == "warning"
    assert "'<pad>' (320)" in one.message
    tiny_model("mixtral").save_pretrained(tmp_path / "small")  # has 96
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    one = only(spec_of(tmp_path / "small"))
    assert one.severity == "error"
    assert "and 221 more; the tokenizer is another model's" in one.message


@pytest.mark.parametrize("path", ["nowhere", "./nowhere/at-all", "/nowhere/at-all", "a/b/c"])
def test_a_path_to_nothing(path: str) -> None:
    one = only(spec_of(path))
    assert (one.severity, one.path) == ("error", "models.0.path")
    assert one.message.startswith(f"{path!r} is not a folder, not a hub id")


def test_a_path_to_a_file(whole: Path) -> None:
    one = only(spec_of(whole / "config.json"))
    assert one.message.endswith("is a file; give the folder that holds the model's files")


def test_numbers_of_experts_that_the_model_does_not_have(whole: Path) -> None:
    wanted = {"experts_per_token": 3, "min_experts_per_token": 3}
    keys = ["models.0.experts_per_token", "models.0.min_experts_per_token"]
    checked = preflight(spec_of(whole, model=wanted))
    assert [one.path for one in checked.findings] == keys
    assert checked.findings[0].message == "3, but 'm' has 2 experts per token; set at most 2"


# ---- a hub ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Its cache on this machine; there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def nobody(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    return tmp_path / "hub"


def _cache(hub: Path, folder: Path) -> Path:
    cached = hub / "models--org--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("1" * 40)
    return shutil.copytree(folder, cached / "snapshots" / ("1" * 40))


def test_a_hub_id_that_is_not_here_is_unchecked(hub: Path) -> None:
    one = only(spec_of("org/name", network={"bind": "node"}))
    assert (one.severity, one.path) == ("unchecked", "models.0.path")
    assert "'org/name' is not in the hub's cache here; `moesaic inspect org/name`" in one.message


def test_a_hub_id_that_is_here_in_parts_is_unchecked(hub: Path, folder: Path) -> None:
    _remove("model.safetensors")(folder)
    _cache(hub, folder)
    one = only(spec_of("org/name", network={"bind": "node"}))
    assert (one.severity, "in parts" in one.message) == ("unchecked", True)


def test_a_hub_id_that_is_here_is_checked(hub: Path, folder: Path) -> None:
    cached = _cache(hub, folder)
    spec = spec_of("org/name", network={"bind": "node"})
    assert preflight(spec).findings == []
    _remove(*TOKENIZER)(cached)
    assert "no tokenizer" in only(spec).message


def test_the_demo_model_is_not_made_for_a_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
    one = only(spec_of("demo"))
    assert (one.severity, "made at the first start" in one.message) == ("unchecked", True)
    assert list(tmp_path.iterdir()) == []


# ---- engine, ports, devices, memory, room --------------------------------------------------------


def test_an_engine_that_is_not_installed(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    one = only(spec_of(whole, trunk={"engine": "vllm"}))
    assert (one.severity, one.path) == ("error", "trunk.engine")
    assert "pip install 'moesaic[vllm]'" in one.message


def test_vllm_reads_no_quantised_trunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    FORMS["gpt-oss"](tmp_path / "m")
    for name in ("m", "m-plain"):
        tiny_tokenizer().save_pretrained(tmp_path / name)
    vllm = {"trunk": {"engine": "vllm"}}
    engine = [
        one
        for name in ("m", "m-plain")
        for one in preflight(spec_of(tmp_path / name, **vllm)).findings
        if one.path == "trunk.engine"
    ]
    assert [(one.severity, one.code) for one in engine] == [("error", "UnsupportedModel")]
    assert "quantised (mxfp4)" in engine[0].message


def test_ports(whole: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        both = spec_of(whole, endpoint={"port": port}, router={"port": port})
        assert found(both) == [
            ("error", "endpoint.port"),
            ("error", "router.port"),
            ("error", "router.port"),
        ]
        messages = [one.message for one in preflight(both).findings]
        shared = spec_of(whole, endpoint={"port": port}, ray={"address": "auto"})
        assert found(shared) == [], "Serve may be who listens there"
    assert messages[0].startswith(f"127.0.0.1:{port} is not free (Address already in use)")
    assert messages[2].startswith(f"port {port} is also the endpoint's")
    assert found(both) == [("error", "router.port")]
    watched = spec_of(whole, monitoring={"port": port}, router={"port": port})
    assert found(watched) == [("error", "monitoring.port")]
    assert (
        preflight(watched)
        .findings[0]
        .message.startswith(f"port {port} is also the router service's")
    )
    unwatched = spec_of(whole, endpoint=None, monitoring={"port": port}, router={"port": port})
    assert found(unwatched) == [], "without an endpoint nobody listens there"
    apart = {"endpoint": {"port": port}, "router": {"port": port, "host": "127.0.0.2"}}
    assert found(spec_of(whole, **apart)) == []


def test_an_address_of_another_machine(whole: Path) -> None:
    one = only(spec_of(whole, network={"bind": "203.0.113.1"}))
    assert (one.severity, one.path) == ("error", "network.bind")
    remote = spec_of(whole, network={"bind": "203.0.113.1"}, ray={"address": "auto"})
    assert found(remote) == [], "its hosts are elsewhere"


@pytest.mark.parametrize("part", ["endpoint", "router"])
def test_a_port_at_an_address_of_another_machine(part: str, whole: Path) -> None:
    one = only(spec_of(whole, **{part: {"host": "203.0.113.1", "port": 8123}}))
    assert (one.severity, one.path) == ("error", f"{part}.host")
    assert one.message.startswith("'203.0.113.1' is no address of this machine")


def test_a_port_of_ip_version_6() -> None:
    with socket.socket(socket.AF_INET6) as taken:
        try:
            taken.bind(("::1", 0))
        except OSError:
            return  # a machine without it
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match="Address already in use"):
            check_port("endpoint", "::1", port)
    check_port("endpoint", "::1", port)
    with pytest.raises(ClusterError, match=r"endpoint\.host: 'no\.such\.invalid' is no address"):
        check_port("endpoint", "no.such.invalid", port)


def test_devices_and_resources_that_a_local_ray_lacks(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    group = {"count": 1, "num_gpus": 1, "resources": {"slot": 1}, "device": "cuda:0"}
    wanted: dict[str, Any] = {"hosts": [group], "trunk": {"device": "cuda"}}
    assert found(spec_of(whole, **wanted)) == [
        ("error", "hosts.0.resources"),
        ("error", "hosts.0.num_gpus"),
        ("error", "hosts.0.device"),
        ("error", "trunk.device"),
    ]
    assert found(spec_of(whole, **wanted, ray={"address": "auto"})) == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    del group["resources"]
    assert found(spec_of(whole, **wanted)) == []


@pytest.mark.parametrize(
    ("group", "severity"),
    [
        ({"count": 2, "slots": 4}, None),
        ({"count": 2, "slots": 3}, "error"),
        ({"count": 2, "memory_gb": 4 * 18432 / 2**30}, None),
        ({"count": 2, "memory_gb": 3 * 18432 / 2**30}, "error"),
    ],
)
def test_room_for_experts(whole: Path, group: dict[str, Any], severity: str | None) -> None:
    wanted = [] if severity is None else [(severity, "hosts")]
    assert found(spec_of(whole, hosts=[group])) == wanted


def test_replicas_count_and_protection_is_a_constraint(whole: Path) -> None:
    hosts = [{"count": 2, "slots": 4}]
    one = only(spec_of(whole, hosts=hosts, model={"replicas": 2}))
    assert (one.severity, one.path) == ("error", "hosts")
    assert "room for 8 experts, and 16 need it" in one.message
    one = only(spec_of(whole, hosts=hosts, balance={"redundancy": 1}))
    assert (one.severity, one.path) == ("warning", "balance.redundancy")


def test_memory_of_this_machine(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def machine(total: int, free: int) -> None:
        monkeypatch.setattr(check_machine, "machine_memory", lambda: (total, free))

    machine(10**12, 10**12)
    assert found(spec_of(whole)) == []
    machine(10**12, 10**8)  # the processes alone take more
    assert found(spec_of(whole)) == [("warning", "hosts")]
    # 8 experts of 18,432 bytes, and what the trunk has beside them.
    weights = 8 * 18432 + preflight(spec_of(whole)).described["m"].trunk_bytes
    machine(weights - 1, 0)
    assert found(spec_of(whole)) == [("error", "hosts")]
    machine(weights, 0)
    assert found(spec_of(whole)) == [("warning", "hosts")]
    assert found(spec_of(whole, model={"replicas": 2})) == [("error", "hosts")]
    assert found(spec_of(whole, ray={"address": "auto"})) == []


def test_a_containers_limit_is_the_machines_memory(tmp_path: Path) -> None:
    total, free = machine_memory([])
    assert 0 < free <= total
    (tmp_path / "limit").write_text("1000000\n")
    (tmp_path / "none").write_text("max\n")
    assert machine_memory([str(tmp_path / name) for name in ("none", "absent")])[0] == total
    assert machine_memory([str(tmp_path / "limit")]) == (1_000_000, 1_000_000)


# ---- all of it -----------------------------------------------------------------------------------


def test_all_errors_are_told_at_once(folder: Path) -> None:
    _remove(*TOKENIZER)(folder)
    spec = spec_of(folder, hosts=[{"count": 1, "slots": 1}], network={"bind": "203.0.113.1"})
    with pytest.raises(ClusterError) as caught:
        raise_errors(preflight(spec).findings)
    head, *lines = str(caught.value).splitlines()
    assert head == "3 things keep the cluster from starting:"
    paths = ["models.0.path", "hosts", "network.bind"]
    assert [line.split(":")[0].strip() for line in lines] == paths


def test_up_does_not_start_ray_where_an_error_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moesaic.actors.serve import launch

    def started(*_: Any) -> bool:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(launch, "start_ray", started)
    _remove(*TOKENIZER)(folder)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        launch.launch(spec_of(folder), lambda *_: None)
    odd: list[str] = []
    tiny_tokenizer(chat=False).save_pretrained(folder)
    (folder / TEMPLATE).unlink()
    with pytest.raises(AssertionError, match="Ray was started"):
        launch.launch(spec_of(folder), lambda *_: None, odd.append)
    assert [text.partition(":")[0] for text in odd] == ["warning"]


def test_numbers_of_findings() -> None:
    def some(*severities: Any) -> str:
        return severity_counts([Finding(severity=one, path="a", message="b") for one in severities])

    assert some() == "no problem"
    assert some("warning", "error", "warning", "unchecked") == "1 error, 2 warnings, 1 unchecked"


def test_spec_check_and_inspect(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(f"models: [{{name: m, path: {folder}}}]\nendpoint: {{port: 0}}\n")
    assert main(["spec", "check", str(file)]) == 0
    assert "is valid: cluster local, 2 hosts, m" in " ".join(capsys.readouterr().out.split())
    (folder / TEMPLATE).unlink()
    assert main(["spec", "check", str(file)]) == 0
    said_ = capsys.readouterr()
    assert said_.out.startswith("warning: models.0.path: ")
    assert "can be started (1 warning)" in " ".join(said_.out.split())
    _remove(*TOKENIZER)(folder)
    assert main(["spec", "check", str(file)]) == 1
    said_ = capsys.readouterr()
    assert said_.out.startswith("error: models.0.path: ")
    assert said_.err == f"error: {file}: cannot be started: 1 error\n"
    assert main(["spec", "check", str(file), "--json"]) == 1
    (one,) = json.loads(capsys.readouterr().out)["findings"]
    assert (one["severity"], one["path"], one["code"]) == (
        "error",
        "models.0.path",
        "CheckpointError",
    )
    assert main(["inspect", str(folder)]) == 0
    assert f"warning: model: {folder}: no tokenizer" in capsys.readouterr().out
    _without("model.norm.weight")(folder)
    assert main(["inspect", str(folder), "--json"]) == 1
    said_ = capsys.readouterr()
    assert json.loads(said_.out)["findings"][0]["severity"] == "error"
    assert "model.norm.weight" in said_.err


def test_a_model_of_any_size_takes_seconds(tmp_path: Path) -> None:
    """160 files of 90,000 tensors; CPU time, since other tests may run beside this one."""
    sparse_deepseek(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = {"dtype": "bfloat16"}
    spec = spec_of(tmp_path, model=model, hosts=[{"count": 64, "memory_gb": 40}])
    began = time.process_time()
    checked = preflight(spec)
    assert time.process_time() - began < 5.0
    # 1.3 TB in bfloat16 are more than this machine has, and 64 x 40 GB is room enough.
    (one,) = checked.findings
    assert (one.severity, one.path) == ("error", "hosts")
    assert "the models' weights need 1,342.1 GB" in one.message
    assert (
        found(spec_of(tmp_path, model=model, hosts=[{"count": 64}], ray={"address": "auto"})) == []
    )


PROBE = """
import sys
from moesaic.cli.main import main
code = main(["spec", "check", sys.argv[1]])
print(code, sorted({"ray", "grpc", "vllm"} & set(sys.modules)))
"""


def test_a_check_imports_no_ray(whole: Path, tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(f"models: [{{name: m, path: {whole}}}]\nendpoint: {{port: 0}}\n")
    done = subprocess.run(
        [sys.executable, "-c", PROBE, file], capture_output=True, text=True, timeout=100
    )
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


@pytest.mark.parametrize("address", ["local", "head:6379"])
def test_hosts_run_on_linux_alone(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_machine, "sys", SimpleNamespace(platform="darwin"))
    found = [
        str(one)
        for one in preflight(parse_spec({"ray": {"address": address}})).findings
        if one.severity == "error"
    ]
    # A Ray elsewhere has its hosts elsewhere.
    assert [one.startswith("hosts: hosts run on Linux alone") for one in found] == (
        [True] if address == "local" else []
    )
