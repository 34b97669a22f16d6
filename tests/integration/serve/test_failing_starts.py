"""Starts that fail behind all checks: the error of `up` names the part, its cause, and its log."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import serve
from safetensors.torch import load_file, save_file

import moesaic
from moesaic.actors.serve import deploy, trunk_apps
from moesaic.cli.main import main
from moesaic.proto.errors import ClusterError
from tests.helpers.endpoint.scripted import broken_engine
from tests.helpers.models.architectures import tiny_model
from tests.helpers.models.quantising import fp8
from tests.helpers.models.tiny import tiny_tokenizer
from tests.helpers.processes.live import ON_RAY

pytestmark = ON_RAY

Capture = pytest.CaptureFixture[str]
NAME = f"fails-{os.getpid()}"


@pytest.fixture(scope="module", autouse=True)
def shared_ray() -> Iterator[None]:
    """One Ray of this process's own for all starts; a spec's checks of this machine are not made
    for it, which may have others."""
    ray.init(
        address="local",
        num_cpus=16,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
    )
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _model(tmp_path_factory.mktemp("model"), lambda name: False)


def _model(root: Path, spoilt: Callable[[str], bool]) -> Path:
    """A quantised model whose scales of the names that are ``spoilt`` are not numbers: no header
    says so."""
    fp8(tiny_model("qwen3_moe", vocab_size=320), root / "m", block=(10, 7))
    for file in (root / "m").glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("scale_inv") and spoilt(name):
                tensor.fill_(torch.nan)
        save_file(tensors, file, metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained(root / "m")
    return root / "m"


def start(folder: Path, **more: Any) -> str:
    """The error of a start that fails."""
    spec: dict[str, Any] = {
        "name": NAME,
        "models": [{"name": "m", "path": str(folder)}],
        "hosts": [{"count": 1, "num_cpus": 0.1}],
        "trunk": {"num_cpus": 0.1, "threads": 1, "cache_tokens": 1024},
        "endpoint": {"port": 0},
        "monitoring": {"port": 0},
        **more,
    }
    with pytest.raises(ClusterError) as caught:
        moesaic.up(spec).down()
    return str(caught.value)


def test_a_host(folder: Path, capsys: Capture) -> None:
    said = start(folder, network={"bind": "203.0.113.1"})
    assert said.startswith("host-0 did not start: ClusterError: bind: cannot listen on 203.0.113.1")
    assert said.endswith(f"; `moesaic logs --host host-0 --name {NAME}` has more")
    assert main(["logs", "--host", "host-0", "--name", NAME]) == 0
    assert f"moesaic: host host-0 of {NAME}" in capsys.readouterr().out


def test_the_experts_of_a_model(tmp_path: Path) -> None:
    said = start(_model(tmp_path, lambda name: ".experts.3." in name), endpoint=None)
    assert said.startswith("loading experts: host-0: CheckpointError: ")
    assert "finite" in said


@pytest.mark.slow
def test_a_trunk(tmp_path: Path, capsys: Capture) -> None:
    said = start(_model(tmp_path, lambda name: ".self_attn.q_proj." in name))
    assert said.startswith(
        f"endpoint: the trunk of model 'm' did not start: CheckpointError: {tmp_path}"
    )
    assert "finite" in said
    assert said.endswith(f"; `moesaic logs trunk --name {NAME}` has more")
    assert main(["logs", "trunk", "--name", NAME]) == 0
    assert f"moesaic: trunk m of {NAME}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_trunk_that_makes_no_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunk_apps, "EngineFactory", lambda config: broken_engine)
    words = "the trunk of model 'm' did not start: EngineError: its forward pass is broken"
    assert start(folder).startswith(f"endpoint: {words}")


@pytest.mark.slow
def test_the_ingress(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan() -> Any:
        raise KeyError("a word that is not there")

    monkeypatch.setattr(deploy, "StoredPlan", lambda namespace: plan)
    said = start(folder)
    words = "endpoint: the ingress did not start: KeyError: 'a word that is not there'"
    assert said.startswith(words)


@pytest.mark.slow
def test_a_trunk_that_is_killed_cannot_tell_why_itself(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def factory(_: Any) -> Callable[[], Any]:
        return lambda: os._exit(1)

    monkeypatch.setattr(trunk_apps, "EngineFactory", factory)
    said = start(folder)
    words = (
        "endpoint: the trunk of model 'm' did not start: its process was killed or ended by itself"
    )
    assert said.startswith(words)
    assert said.endswith(f"; `moesaic logs trunk --name {NAME}` has more")
