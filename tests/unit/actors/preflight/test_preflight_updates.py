"""What a preflight finds in the folder of a model's updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moesaic.actors.preflight.findings import Finding
from moesaic.actors.preflight.preflight import preflight
from moesaic.cluster.expert_keys import ExpertKey
from moesaic.cluster.spec.spec import Spec, parse_spec
from moesaic.cluster.update_folder import UpdateFolder
from moesaic.cluster.weight_updates import WeightUpdate
from moesaic.models.folder.expert_file import write_experts
from moesaic.models.trunk.checkpoint import Checkpoint
from moesaic.models.trunk.config import read_config
from tests.helpers.models.preflight_specs import found, only, spec_of

Place = tuple[int, int]


def with_updates(folder: Path, updates: Path) -> Spec:
    return spec_of(folder, model={"updates": str(updates)})


def expert(folder: Path, place: Place) -> dict[str, Tensor]:
    read = Checkpoint(folder, read_config(folder), dtype=torch.float32).read
    return read(*place).tensors()


def keep(updates: Path, experts: dict[Place, Any], *recorded: Place) -> Path:
    """Write update 2 of ``experts``, whose record names these or others."""
    updates.mkdir(exist_ok=True)
    folder = UpdateFolder(updates, "m")
    write_experts(folder.weights(2), experts)
    keys = [ExpertKey("m", *place) for place in recorded or experts]
    folder.record(
        WeightUpdate(
            model="m",
            number=2,
            versions=dict.fromkeys(keys, 2),
            before=dict.fromkeys(keys, 1),
            who="anna",
        ),
        None,
    )
    return folder.weights(2)


def error(folder: Path, updates: Path) -> str:
    finding: Finding = only(with_updates(folder, updates))
    assert (finding.severity, finding.path) == ("error", "models.0.updates")
    return finding.message


def test_a_folder_that_is_to_be_made_or_fits_is_fine(folder: Path, tmp_path: Path) -> None:
    assert found(with_updates(folder, tmp_path / "a" / "b")) == []
    assert not (tmp_path / "a").exists(), "a check makes nothing"
    keep(tmp_path / "u", {(1, 2): expert(folder, (1, 2))})
    assert found(with_updates(folder, tmp_path / "u")) == []


def test_updates_that_do_not_fit_are_found(folder: Path, tmp_path: Path) -> None:
    tensors = expert(folder, (1, 2))
    wrong = {name: tensor[:-1] for name, tensor in tensors.items()}
    keep(tmp_path / "a", {(1, 2): wrong})
    assert "expert 2 of layer 1 has tensors" in error(folder, tmp_path / "a")
    keep(tmp_path / "b", {(1, 2): tensors}, (1, 2), (1, 3))
    assert "lacks expert 3 of layer 1" in error(folder, tmp_path / "b")
    keep(tmp_path / "c", {(7, 2): tensors})
    assert "expert 2 of layer 7, which the model lacks" in error(folder, tmp_path / "c")


def test_damage_is_found(folder: Path, tmp_path: Path) -> None:
    file = keep(tmp_path / "u", {(1, 2): expert(folder, (1, 2))})
    file.write_bytes(file.read_bytes()[:-10])
    assert "00000002.safetensors: damaged or truncated" in error(folder, tmp_path / "u")
    save_file({"x": torch.zeros(1)}, file)
    assert "x does not name a tensor of an expert, such as 0.3.up" in error(folder, tmp_path / "u")
    file.unlink()
    assert "00000002.safetensors is missing, which a record" in error(folder, tmp_path / "u")
    (tmp_path / "u" / "00000002.json").write_text("[")
    assert "not a record of an update" in error(folder, tmp_path / "u")


def test_one_folder_under_two_names_is_found(folder: Path, tmp_path: Path) -> None:
    models = [
        {"name": name, "path": str(folder), "updates": updates}
        for name, updates in (("m", f"{tmp_path}/u"), ("n", f"{tmp_path}/./x/../u"))
    ]
    spec = parse_spec({"name": "a", "models": models, "endpoint": {"port": 0}})
    findings = [one for one in preflight(spec).findings if one.severity == "error"]
    assert [(one.path, one.message) for one in findings] == [
        ("models.1.updates", "models.0.updates is the same folder; give each model its own")
    ]


def test_a_place_that_is_no_folder_is_found(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is not a folder" in error(folder, tmp_path / "file")


def test_a_place_that_cannot_be_written_is_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As for a user who may not write there; a test may run as root.
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    assert "cannot be made" in error(folder, tmp_path / "a")
    assert "no update could be kept in it" in error(folder, tmp_path)
