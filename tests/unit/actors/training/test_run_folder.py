"""The folder of a run: when one may begin or go on there, and its records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moesaic.actors.training.command.run_folder import RunFolder
from moesaic.cluster.train_command.records import HeldOutRecord
from moesaic.cluster.train_command.train_spec import TrainSpec
from moesaic.proto.errors import CheckpointError, SpecError


def spec(**changes: Any) -> TrainSpec:
    return TrainSpec.model_validate({"data": {"path": "texts"}} | changes)


def held_out(step: int) -> HeldOutRecord:
    return HeldOutRecord(step=step, held_out_loss=1.5, held_out_targets=3)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_a_run_begins_where_none_has_and_goes_on_where_one_has(folder: RunFolder) -> None:
    with pytest.raises(SpecError, match=r"checkpoints\.folder: .* it has no run to resume"):
        folder.check(spec(), resume=True)
    folder.check(spec(), resume=False)
    folder.begin(spec())
    # Nothing has been done yet, so it may as well begin with another spec.
    folder.check(spec(data={"path": "others"}), resume=False)
    folder.add(held_out(0))
    with pytest.raises(SpecError, match="it has a run already"):
        folder.check(spec(), resume=False)
    folder.check(spec(), resume=True)


def test_what_would_make_it_another_run_cannot_change(folder: RunFolder) -> None:
    folder.begin(spec())
    folder.add(held_out(0))
    for changes, path in [
        ({"data": {"path": "others"}}, "data.path: 'others'"),
        ({"data": {"path": "texts", "seed": 1}}, "data.seed: 1"),
        ({"batch": {"sequences": 4}}, "batch.sequences: 4"),
        ({"optimizer": {"name": "SGD"}}, "optimizer.name: 'SGD'"),
        ({"model": "m"}, "model: 'm'"),
    ]:
        with pytest.raises(SpecError, match=f"^{path}, and the run in .* was begun with"):
            folder.check(spec(**changes), resume=True)
    told: list[str] = []
    folder.check(spec(steps=9, workers={"count": 2}), resume=True, told=told.append)
    assert told == [
        "steps: 200 before, and 9 from now on",
        "workers.count: 1 before, and 2 from now on",
    ]


def test_a_damaged_note_of_the_spec_is_said(folder: RunFolder) -> None:
    folder.begin(spec())
    folder.add(held_out(0))
    (folder.path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json: no spec of a run"):
        folder.check(spec(), resume=True)


def test_records_are_read_where_the_last_ones_ended(folder: RunFolder) -> None:
    assert folder.records() == ([], 0)
    folder.begin(spec())
    folder.add(held_out(0))
    first, place = folder.records()
    folder.add(held_out(1))
    folder.add(held_out(2))
    second, end = folder.records(place)
    assert (first, second) == ([held_out(0)], [held_out(1), held_out(2)])
    assert folder.records(end) == ([], end)


def test_a_part_of_a_line_is_left_out_and_the_next_one_is_whole(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    """A process was killed while it wrote."""
    folder.begin(spec())
    folder.add(held_out(0))
    with (folder.path / "steps.jsonl").open("a") as file:
        file.write('{"step": 1, "held')
    _, place = folder.records()
    assert folder.records()[0] == [held_out(0)]
    RunFolder(folder.path).add(held_out(1))
    assert folder.records(place)[0] == [held_out(1)]
    assert "a line is left out" in caplog.text
