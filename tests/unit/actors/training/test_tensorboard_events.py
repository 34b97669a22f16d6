"""Events for TensorBoard have every number of a record."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moesaic.actors.training.command.events import Events
from moesaic.cluster.train_command.records import HeldOutRecord, StepRecord

STEP = StepRecord(
    step=3,
    loss=2.5,
    targets=90,
    tokens=100,
    seconds=0.5,
    lr=1e-4,
    grad_norm=None,
    workers=2,
    attempts=1,
    entropy=0.75,
)


def test_the_numbers_of_records_are_written(tmp_path: Path) -> None:
    with Events(tmp_path) as events:
        assert events.writes
        events.add(HeldOutRecord(step=2, held_out_loss=0.0, held_out_targets=5))
        events.add(STEP, balancedness=0.5)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path))
    read.Reload()
    found = {
        tag: (one.step, pytest.approx(one.value))
        for tag in read.Tags()["scalars"]
        for one in read.Scalars(tag)
    }
    assert found == {
        "held_out/loss": (2, 0.0),
        "held_out/perplexity": (2, 1.0),
        "train/loss": (3, 2.5),
        "train/lr": (3, 1e-4),
        "train/entropy": (3, 0.75),
        "train/workers": (3, 2),
        "train/attempts": (3, 1),
        "train/tokens_per_s": (3, 200),
        "train/balancedness": (3, 0.5),
    }


def test_without_the_package_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Events(tmp_path) as events:
        assert not events.writes
        events.add(STEP)
    assert not list(tmp_path.iterdir())
