"""Commands that need no cluster: versions, models, specs; and overrides from the environment."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from jsonschema import Draft202012Validator

import moesaic
from moesaic import about
from moesaic.actors.preflight import preflight
from moesaic.actors.runtime import devices
from moesaic.cli.main import main
from moesaic.cluster.card_memory import Card
from moesaic.cluster.spec.spec import load_spec, parse_spec
from moesaic.models.trunk.describe import HOST_BYTES, describe
from moesaic.models.trunk.experts_layers import expert_parameters, experts_layers
from moesaic.proto.errors import CheckpointError, SpecError
from tests.helpers.models.architectures import ARCHITECTURES, tiny_model

Capture = pytest.CaptureFixture[str]


def test_versions(capsys: Capture) -> None:
    assert main(["version", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["moesaic"] == moesaic.__version__
    assert {"python", "ray", "torch", "transformers"} <= found.keys()
    assert main(["version"]) == 0
    assert f"torch {found['torch']}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2", "gpt_oss", "qwen3_moe"])
def test_sizes_are_those_of_the_parameters(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    found = describe(tmp_path, torch.bfloat16)
    layers = experts_layers(model)
    experts = sum(p.numel() for layer in layers for _, p in expert_parameters(layer))
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert found.experts_bytes == 2 * experts
    assert found.trunk_bytes == 2 * (whole - experts)
    assert found.layers == {layer.layer: layer.num_experts for layer in layers}
    assert found.top_k == 2
    assert found.experts_bytes == sum(found.layers.values()) * found.expert_bytes


def test_most_configurations_say_how_many_experts_a_token_has(tmp_path: Path) -> None:
    for name in sorted(ARCHITECTURES)[:8]:
        tiny_model(name).save_pretrained(tmp_path / name)
        assert describe(tmp_path / name, torch.float32).top_k == 2, name


def test_how_many_hosts(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    found = describe(tmp_path, torch.float32)
    experts = sum(found.layers.values())
    assert experts == 16
    room_for_five = HOST_BYTES + 5 * found.expert_bytes
    assert found.hosts(room_for_five) == 4
    assert found.hosts(room_for_five, replicas=2) == 7
    assert found.hosts(10**12, replicas=3) == 3  # no host holds an expert twice
    with pytest.raises(ValueError, match="no room for an expert"):
        found.hosts(HOST_BYTES)


def test_inspect(tmp_path: Path, capsys: Capture) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--json", "--replicas", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["architecture"], found["hosts"], found["top_k"]) == ("mixtral", 2, 2)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "2, 8 experts each" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path), "--memory", "lots"]) == 2
    assert "not a size in bytes" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path), "--memory", "1MB"]) == 2
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "neither a folder" in capsys.readouterr().err


SPEC = (
    "name: a\nmodels: [{name: m, path: demo}]\nhosts: [{count: 2}]\n"
    "endpoint: {port: 0}\nmonitoring: {port: 0}\n"
)


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    file = tmp_path / "spec.yaml"
    file.write_text(SPEC)
    return file


def test_spec_check(spec: Path, capsys: Capture) -> None:
    assert main(["spec", "check", str(spec)]) == 0
    assert "cluster a, 2 hosts, m" in " ".join(capsys.readouterr().out.split())
    assert main(["spec", "check", str(spec), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hosts"][0]["count"] == 2
    spec.write_text("hosts: [{cuont: 2}]")
    assert main(["spec", "check", str(spec)]) == 1
    assert "hosts.0.cuont: unknown key" in capsys.readouterr().err


def test_the_schema_takes_what_the_parser_takes(capsys: Capture) -> None:
    assert main(["spec", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    validator = Draft202012Validator(schema)
    validator.check_schema(schema)
    good = {"name": "a", "hosts": [{"count": 2, "memory_gb": 8}], "endpoint": {"port": 0}}
    assert validator.is_valid(good)
    assert not validator.is_valid({"hosts": [{"cuont": 2}]})
    assert not validator.is_valid({"endpoint": {"port": 70_000}})


def test_the_environment_overrides_a_spec(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "MOESAIC__NAME": "b",
        "MOESAIC__HOSTS__0__COUNT": "4",
        "MOESAIC__ENDPOINT__LIMITS__ANSWER_TOKENS": "7",
        "MOESAIC__BALANCE": "{redundancy: 1}",
        "MOESAIC_CACHE": "/not/a/key",
    }.items():
        monkeypatch.setenv(name, value)
    found = load_spec(spec)
    assert (found.name, found.hosts[0].count, found.balance.redundancy) == ("b", 4, 1)
    assert found.endpoint is not None
    assert (found.endpoint.port, found.endpoint.limits.answer_tokens) == (0, 7)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MOESAIC__HOSTS__3__COUNT", "1", "MOESAIC__HOSTS__3__COUNT: the list has no entry 3"),
        ("MOESAIC__HOSTS__X", "1", "MOESAIC__HOSTS__X: invalid literal"),
        ("MOESAIC__NAME__X", "1", "the value 'a' is not a mapping, so it has no key 'x'"),
        ("MOESAIC__NAME", "{", "MOESAIC__NAME: while parsing"),
        ("MOESAIC__ENDPIONT__PORT", "1", "endpiont: unknown key"),
        ("MOESAIC__ENDPOINT__PORT", "x", "endpoint.port"),
    ],
)
def test_a_wrong_override_is_named(
    spec: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SpecError) as caught:
        load_spec(spec)
    assert message in str(caught.value)


def test_a_check_looks_for_no_garbage_and_does_so_again_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def looked(spec: Any) -> Any:
        seen.append(gc.isenabled())
        raise CheckpointError("broken")

    monkeypatch.setattr(preflight, "preflight", looked)
    with pytest.raises(CheckpointError):
        about.check_spec(parse_spec({"models": [{"name": "m", "path": "p"}]}))
    assert seen == [False]
    assert gc.isenabled()


# ---- a spec for a model --------------------------------------------------------------------------


def printed(capsys: Capture, *words: str) -> Any:
    assert main(["up", *words, "--print-spec"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_a_model_is_enough(tmp_path: Path, capsys: Capture) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "tiny")
    found = printed(capsys, str(tmp_path / "tiny"))
    assert (found["name"], len(found["models"])) == ("local", 1)
    assert (found["models"][0]["name"], found["models"][0]["replicas"]) == ("tiny", 2)
    spec = parse_spec(found)
    assert spec == about.default_spec(str(tmp_path / "tiny"))
    assert spec.num_hosts == 2


def test_one_replica_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    experts = about.inspect_model(str(tmp_path)).experts_bytes
    free = SimpleNamespace(available=2 * experts)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    assert about.default_spec(str(tmp_path)).models[0].replicas == 1


def test_one_replica_where_a_gpus_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    found = about.inspect_model(str(tmp_path))
    needed = 2 * found.experts_bytes + found.trunk_bytes
    for card, replicas in (
        (Card("a", 10**12, needed), 1),
        (Card("a", 10**12, 2 * needed), 2),
        (Card("a", needed), 1),
        (Card("a", 2 * needed), 2),
    ):
        monkeypatch.setattr(devices, "visible_cards", lambda card=card: [card])
        assert about.default_spec(str(tmp_path)).models[0].replicas == replicas


def test_without_a_word_the_spec_that_is_here_or_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert [model["name"] for model in printed(capsys)["models"]] == ["demo"]
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "local.yaml").write_text("name: here\n")
    assert printed(capsys) == {"name": "here"}
    monkeypatch.setenv("MOESAIC__ENDPOINT__PORT", "9000")
    assert printed(capsys, "demo")["endpoint"]["port"] == 9000


def test_what_is_neither_a_file_nor_a_model(tmp_path: Path, capsys: Capture) -> None:
    assert main(["up", str(tmp_path / "no.yaml"), "--print-spec"]) == 1
    assert "no.yaml: cannot be read" in capsys.readouterr().err
    assert main(["up", str(tmp_path / "nothing"), "--print-spec"]) == 1
    assert "nothing" in capsys.readouterr().err
