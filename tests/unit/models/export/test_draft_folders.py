"""A folder is there whole, or not at all, wherever its writing ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moesaic.models.export.draft import new_folder, remove_folder, tidy
from moesaic.models.export.export import export_model
from moesaic.models.export.plan import plan_export
from moesaic.models.export.write_checkpoint import write_checkpoint
from moesaic.proto.errors import CheckpointError
from tests.helpers.models.model_folders import checkpoint, experts_of, saved, trunk_of
from tests.unit.models.export.conftest import Disk

Write = Callable[[Path, bool], None]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def writes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Write]:
    source = tmp_path_factory.mktemp("model") / "source"
    saved(source, "mixtral", model={"num_hidden_layers": 1})
    trunk, experts = trunk_of(source), experts_of(checkpoint(source))
    plan = plan_export(trunk, max_shard_bytes=40_000)

    def plain(target: Path, overwrite: bool) -> None:
        with new_folder(target, overwrite=overwrite) as draft:
            (draft / "a").mkdir()
            (draft / "a" / "b").write_text("new")
            (draft / "c").write_text("new")

    def export(target: Path, overwrite: bool) -> None:
        export_model(target, plan, trunk, experts, overwrite=overwrite)

    def whole(target: Path, overwrite: bool) -> None:
        write_checkpoint(
            target,
            plan,
            trunk,
            experts,
            step=3,
            run={"step": 3},
            state=lambda layer: ((e, {"up.master": torch.ones(200)}) for e in range(8)),
            trunk_state=[("a.exp_avg", torch.ones(2)), ("b.exp_avg", torch.ones(2))],
            max_part_bytes=4_000,
        )

    return {"plain": plain, "export": export, "checkpoint": whole}


CASES = [("plain", False), ("plain", True), ("export", False), ("export", True)]
CASES.append(("checkpoint", False))


@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for-good"])
@pytest.mark.parametrize(("kind", "overwrite"), CASES)
def test_a_disk_that_fails_at_any_change(
    kind: str, overwrite: bool, for_good: bool, disk: Disk, writes: dict[str, Write], tmp_path: Path
) -> None:
    write = writes[kind]
    target = tmp_path / "found"
    old = {"old": b"whole"}

    def begin() -> None:
        if overwrite:
            target.mkdir(exist_ok=True)
            (target / "old").write_bytes(b"whole")

    write(tmp_path / "other", False)
    new = contents(tmp_path / "other")
    begin()
    with disk.refusing(None, for_good=False):
        write(target, overwrite)
    changes = disk.changes
    assert changes > (9 if kind == "plain" else 30)
    remove_folder(target)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    for first in range(1, changes + 1):
        begin()
        with disk.refusing(first, for_good=for_good):
            try:
                write(target, overwrite)
            except (OSError, CheckpointError):
                pass
            else:
                # Only what is no longer needed may stay, and is removed below.
                assert contents(target) == new
        assert disk.refused
        if target.exists():
            assert contents(target) in ([old, new] if overwrite else [new]), first
        tidy(tmp_path)
        assert hidden(tmp_path) == []
        if overwrite:
            assert contents(target) in (old, new), first
            remove_folder(target)
        elif target.exists():
            assert contents(target) == new
            remove_folder(target)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert len(list(Path("/proc/self/fd").iterdir())) == opened


def test_everything_is_on_the_disk_before_the_folder_has_its_name(
    writes: dict[str, Write], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "found"
    synced: list[Path] = []
    sync = os.fsync

    def watched(opened: int) -> None:
        path = Path(f"/proc/self/fd/{opened}").readlink()
        if path != tmp_path:
            assert not target.exists()
            synced.append(path.relative_to(tmp_path))
        else:
            assert target.exists()
            synced.append(Path())
        sync(opened)

    monkeypatch.setattr(os, "fsync", watched)
    writes["checkpoint"](target, False)
    draft = synced[0].parts[0]
    expected = {Path(draft) / path.relative_to(target) for path in target.rglob("*")}
    assert {*synced} == {*expected, Path(draft), Path()}
    assert synced[-1] == Path()


def test_an_existing_folder_is_kept(writes: dict[str, Write], tmp_path: Path) -> None:
    (tmp_path / "found").mkdir()
    with pytest.raises(CheckpointError, match="found: exists already; give another folder"):
        writes["export"](tmp_path / "found", False)
    assert [path.name for path in tmp_path.iterdir()] == ["found"]
    assert list((tmp_path / "found").iterdir()) == []


def test_of_two_writers_the_second_fails(tmp_path: Path) -> None:
    target = tmp_path / "found"
    with pytest.raises(OSError, match="not empty"), new_folder(target) as slow:
        (slow / "a").write_text("slow")
        with new_folder(target) as fast:
            (fast / "a").write_text("fast")
    assert contents(target) == {"a": b"fast"}
    assert hidden(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(writes: dict[str, Write], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/found: cannot be written: "):
        writes["export"](tmp_path / "file" / "found", False)


def test_an_error_of_the_caller_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "found") as draft:
        (draft / "a").write_text("a")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_only_drafts_without_a_writer_are_removed(tmp_path: Path) -> None:
    lost = tmp_path / f".found.{'0' * 16}.draft"
    lost.mkdir()
    other = tmp_path / f".other.{'0' * 16}.draft"
    other.mkdir()
    (tmp_path / ".found").mkdir()
    held = os.open(other, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        with new_folder(tmp_path / "found") as draft:
            assert not lost.exists()
            tidy(tmp_path)
            assert draft.exists()
            assert other.exists()
    finally:
        os.close(held)
    tidy(tmp_path, "found")
    assert other.exists()
    tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".found", "found"]
