"""What a preflight finds of models that are not in a folder: a hub's, and the demo."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from moesaic.actors.preflight.preflight import preflight
from tests.helpers.models.preflight_specs import TOKENIZER, only, remove, spec_of


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Its cache on this machine; there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tmp_path / "hub"


def _cache(hub: Path, folder: Path) -> Path:
    cached = hub / "models--org--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("1" * 40)
    return shutil.copytree(folder, cached / "snapshots" / ("1" * 40))


def test_a_hub_id_that_is_not_here_is_unchecked(hub: Path) -> None:
    one = only(spec_of("org/name", network={"bind": "node"}))
    assert (one.severity, one.path) == ("unchecked", "models.0.path")
    assert "'org/name' is not in the hub's cache on this machine; " in one.message
    assert "`moesaic inspect org/name`" in one.message


def test_a_hub_id_that_is_here_in_parts_is_unchecked(hub: Path, folder: Path) -> None:
    remove("model.safetensors")(folder)
    _cache(hub, folder)
    one = only(spec_of("org/name", network={"bind": "node"}))
    assert (one.severity, "only partly" in one.message) == ("unchecked", True)


def test_a_hub_id_that_is_here_is_checked(hub: Path, folder: Path) -> None:
    cached = _cache(hub, folder)
    spec = spec_of("org/name", network={"bind": "node"})
    assert preflight(spec).findings == []
    remove(*TOKENIZER)(cached)
    assert "no tokenizer" in only(spec).message


def test_the_demo_model_is_not_made_for_a_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
    one = only(spec_of("demo"))
    assert (one.severity, "made at the first start" in one.message) == ("unchecked", True)
    assert list(tmp_path.iterdir()) == []
