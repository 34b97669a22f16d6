"""Records of steps, which of them count, and the lines that people see."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.cluster.train_command.page import train_spec_page
from moesaic.cluster.train_command.progress import Progress
from moesaic.cluster.train_command.records import (
    HeldOutRecord,
    ReturnRecord,
    StepRecord,
    history,
    line_of,
    record_of,
)
from moesaic.cluster.train_command.train_spec import TrainSpec, differences
from moesaic.proto.errors import CheckpointError
from tests.helpers.paths import ROOT

FIRST = StepRecord(
    step=1,
    loss=2.5,
    targets=2000,
    tokens=2048,
    seconds=2.0,
    lr=1e-4,
    grad_norm=1.25,
    workers=2,
    attempts=1,
)


def held_out(step: int, loss: float = 1.0) -> HeldOutRecord:
    return HeldOutRecord(step=step, held_out_loss=loss, held_out_targets=100)


@given(st.integers(0, 10**6), st.floats(0, 1e4), st.none() | st.floats(0, 1))
def test_a_record_is_what_its_line_says(step: int, loss: float, entropy: float | None) -> None:
    for one in (replace(FIRST, step=step, loss=loss, entropy=entropy), held_out(step, loss)):
        line = line_of(one)
        assert "\n" not in line
        assert record_of(line) == one


def test_a_line_of_a_later_version_is_read_and_a_damaged_one_is_not() -> None:
    later = line_of(FIRST).replace('"step": 1', '"step": 1, "new": 3')
    assert record_of(later) == FIRST
    for damaged in ("", "{", line_of(FIRST)[:40], "[1]", '{"step": 1}'):
        with pytest.raises(CheckpointError, match="no record of a step"):
            record_of(damaged)


def test_what_came_after_a_checkpoint_that_was_taken_over_does_not_count() -> None:
    steps = [replace(FIRST, step=number, loss=float(number)) for number in (1, 2, 3)]
    again = replace(FIRST, step=2, loss=9.0)
    found, evaluations = history([held_out(0), *steps, held_out(3), again, held_out(2)])
    assert [(one.step, one.loss) for one in found] == [(1, 1.0), (2, 9.0)]
    assert [one.step for one in evaluations] == [0, 2]
    back = ReturnRecord(step=1, lost="host-1")
    found, evaluations = history([held_out(0), *steps, held_out(1), held_out(3), back])
    assert [one.step for one in found] == [1]
    assert [one.step for one in evaluations] == [0, 1]
    assert record_of(line_of(back)) == back


def test_the_lines_of_a_run() -> None:
    progress = Progress(200)
    line = progress.step(FIRST)
    assert line == "step   1/200  loss 2.500  1,024 tokens/s  7 min left"
    progress.balancedness = 0.834
    line = progress.step(replace(FIRST, step=2, seconds=1.0, attempts=3))
    assert line == ("step   2/200  loss 2.500  1,365 tokens/s  balance 0.83  5 min left  try 3")
    assert progress.step(replace(FIRST, step=200)).endswith("balance 0.83")
    assert Progress.held_out(held_out(50, 0.5)) == (
        "held out after step 50: perplexity 1.649, loss 0.5000"
    )


@given(
    st.integers(1, 10**6),
    st.floats(0, 9999),
    st.floats(1e-6, 1e6),
    st.integers(0, 10**6),
    st.integers(1, 20),
)
def test_a_line_fits_on_a_terminal(
    step: int, loss: float, seconds: float, tokens: int, attempts: int
) -> None:
    progress = Progress(10**6)
    progress.balancedness = 1.0
    record = replace(FIRST, step=step, loss=loss, seconds=seconds, tokens=tokens, attempts=attempts)
    assert len(progress.step(record)) <= 100
    likely = replace(record, seconds=max(seconds, 0.1), tokens=min(tokens, 10**5), loss=loss % 100)
    assert len(Progress(9999).step(replace(likely, step=step % 9999, attempts=1))) <= 80


def test_a_line_of_a_long_run_fits_into_80_columns() -> None:
    progress = Progress(10_000)
    progress.balancedness = 0.97
    record = replace(FIRST, step=1000, loss=11.2345, tokens=123_456, seconds=1.0, attempts=2)
    assert len(progress.step(record)) <= 80


def test_a_run_that_goes_back_forgets_its_pace() -> None:
    progress = Progress(10)
    progress.step(replace(FIRST, step=5, seconds=100.0))
    progress.step(replace(FIRST, step=3, seconds=1.0))
    assert progress.tokens_per_s == 2048
    assert progress.left_s == 7


def test_what_differs_between_two_specs() -> None:
    def spec(**changes: object) -> TrainSpec:
        return TrainSpec.model_validate({"data": {"path": "x"}} | changes)

    settings = {"name": "AdamW", "settings": {"lr": 1.0}}
    changed = spec(
        data={"path": "x", "seed": 2}, cluster="b", optimizer=settings, workers={"count": 3}
    )
    found = {one.path: one for one in differences(spec(), changed)}
    assert found.keys() == {"data.seed", "optimizer.settings.lr", "workers.count"}
    assert found["data.seed"] == ("data.seed", 0, 2, True)
    assert not found["workers.count"].is_fixed
    assert not differences(spec(), spec(checkpoints={"folder": "elsewhere"}))
    (removed,) = differences(spec(), spec(evaluation=None))[:1]
    assert removed.path.startswith("evaluation")


def test_the_page_is_what_the_code_says() -> None:
    assert (ROOT / "docs" / "train-spec.md").read_text() == train_spec_page(), "run `make spec`"
