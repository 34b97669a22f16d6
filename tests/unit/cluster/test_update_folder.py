"""The folder in which updates outlive the cluster: what counts, what does not, and damage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.cluster import update_folder
from moesaic.cluster.expert_keys import ExpertKey
from moesaic.cluster.update_folder import UpdateFolder, new_file
from moesaic.cluster.weight_updates import WeightUpdate
from moesaic.proto.errors import CheckpointError, ClusterError

A, B = ExpertKey("m", 0, 1), ExpertKey("m", 3, 2)


@pytest.fixture
def folder(tmp_path: Path) -> UpdateFolder:
    return UpdateFolder(tmp_path, "m")


def update(
    number: int,
    versions: Mapping[ExpertKey, int],
    before: Mapping[ExpertKey, int],
    reverts: int | None = None,
) -> WeightUpdate:
    return WeightUpdate(
        model="m", number=number, versions=versions, before=before, who="anna", reverts=reverts
    )


def brings(number: int, *keys: ExpertKey, before: Mapping[ExpertKey, int]) -> WeightUpdate:
    return update(number, dict.fromkeys(keys, number), {k: before.get(k, 1) for k in keys})


def keep(folder: UpdateFolder, one: WeightUpdate, follows: int | None) -> None:
    if one.reverts is None:
        folder.weights(one.number).write_bytes(b"weights")
    folder.record(one, follows)


def test_updates_come_back_as_they_were(folder: UpdateFolder) -> None:
    assert folder.updates() == []
    assert folder.last_number() == 0
    first = brings(2, A, B, before={})
    second = brings(4, A, before={A: 2})
    third = update(5, {A: 2}, {A: 4}, reverts=4)
    for one, follows in ((first, None), (second, 2), (third, 4)):
        keep(folder, one, follows)
    assert folder.updates() == [first, second, third]
    assert folder.last_number() == 5


def test_a_record_without_its_weights_is_refused(folder: UpdateFolder) -> None:
    with pytest.raises(ClusterError, match="must be the same folder on every machine"):
        folder.record(brings(2, A, before={}), None)
    assert folder.updates() == []


def test_what_nothing_follows_does_not_count(folder: UpdateFolder) -> None:
    """A controller that was taken for dead writes its record late."""
    keep(folder, first := brings(2, A, before={}), None)
    keep(folder, brings(3, A, B, before={A: 2}), 2)
    keep(folder, last := brings(4, B, before={}), 2)
    assert folder.updates() == [first, last]


def test_a_number_is_written_once(folder: UpdateFolder) -> None:
    keep(folder, one := brings(2, A, before={}), None)
    with pytest.raises(ClusterError, match="another cluster writes to the same folder"):
        folder.record(brings(2, B, before={}), None)
    assert folder.updates() == [one]
    assert sorted(file.name for file in folder.path.iterdir()) == [
        "00000002.json", "00000002.safetensors",
    ]  # fmt: skip


def test_weights_without_a_record_are_deleted_and_their_number_stays_used(
    folder: UpdateFolder,
) -> None:
    keep(folder, brings(2, A, before={}), None)
    folder.weights(7).write_bytes(b"of an update that was never served")
    assert folder.last_number() == 7
    assert folder.remove_unused() == [folder.weights(7)]
    assert folder.weights(2).exists()


@pytest.mark.parametrize(
    "change",
    [
        {"experts": [[0, 1]]},
        {"experts": [[0, 1, "2"]]},
        {"experts": [[0, -1, 2]]},
        {"experts": 3},
        {"follows": "one"},
        {"follows": 2},
        {"follows": 3},
        {"reverts": 0.5},
        {"initiator": None},
    ],
)
def test_a_damaged_record_is_named(folder: UpdateFolder, change: dict[str, Any]) -> None:
    keep(folder, brings(2, A, before={}), None)
    file = folder.path / "00000002.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=r"00000002\.json: not a record of an update"):
        folder.updates()


def test_other_damage_is_named(folder: UpdateFolder) -> None:
    keep(folder, brings(2, A, before={}), None)
    keep(folder, brings(3, A, before={A: 2}), 2)
    with pytest.raises(CheckpointError, match="is an update of model 'm', not 'n'"):
        UpdateFolder(folder.path, "n").updates()
    (folder.path / "00000002.json").unlink()
    with pytest.raises(CheckpointError, match=r"record 2\.json is missing, which 00000003\.json"):
        folder.updates()
    (folder.path / "00000003.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"00000003\.json: not a record"):
        folder.updates()


def test_a_folder_that_is_not_there_is_not_one_without_updates(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the folder of updates cannot be read"):
        UpdateFolder(tmp_path / "not mounted", "m").updates()


def test_what_could_not_be_brought_to_the_disk_does_not_count(
    folder: UpdateFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path) -> None:
        raise OSError("the disk is gone")

    folder.weights(2).write_bytes(b"weights")
    monkeypatch.setattr(update_folder, "_sync", fails)
    with pytest.raises(ClusterError, match=r"cannot be written: .*the disk is gone"):
        folder.record(brings(2, A, before={}), None)
    monkeypatch.undo()
    assert folder.updates() == []
    folder.remove_weights(2)
    assert list(folder.path.iterdir()) == []


def test_drafts_of_a_killed_process_are_deleted(folder: UpdateFolder) -> None:
    keep(folder, brings(2, A, before={}), None)
    draft = folder.path / ".00000003.safetensors.0123456789abcdef"
    draft.write_bytes(b"half")
    (folder.path / ".somebody's own").write_text("")
    assert folder.remove_unused() == [draft]
    folder.remove_weights(2)
    assert folder.weights(2).exists(), "a record has them"


def test_a_draft_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with new_file(tmp_path / "x") as draft:
            draft.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert list(tmp_path.iterdir()) == []


KEYS = st.dictionaries(
    st.builds(ExpertKey, st.just("m"), st.integers(0, 5), st.integers(0, 9)),
    st.integers(1, 1 << 40),
    min_size=1,
    max_size=5,
)


@given(KEYS)
def test_any_update_can_be_kept(tmp_path_factory: pytest.TempPathFactory, versions: Any) -> None:
    folder = UpdateFolder(tmp_path_factory.mktemp("updates"), "m")
    one = update(2, versions, dict.fromkeys(versions, 1), reverts=1)
    folder.weights(2).write_bytes(b"")
    folder.record(one, None)
    assert folder.updates() == [one]
