"""The spec of `moesaic train`: defaults, and what is wrong is named by its path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from moesaic.cluster.train_command.schedule import Kind, Schedule
from moesaic.cluster.train_command.train_spec import TrainSpec, load_train_spec
from moesaic.proto.errors import SpecError


def loaded(folder: Path, text: str) -> TrainSpec:
    path = folder / "train.yaml"
    path.write_text(text, encoding="utf-8")
    return load_train_spec(path)


def test_the_data_alone_has_to_be_said(tmp_path: Path) -> None:
    found = loaded(tmp_path, "data: {path: docs}")
    assert (found.cluster, found.model, found.steps) == ("local", None, 200)
    assert found.batch.sequences == 8
    assert found.optimizer.settings == {"lr": 1e-4}
    assert found.curve == Schedule(kind="cosine", steps=200, last_part=0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a mapping is expected, not NoneType"),
        ("steps: 3", "data.path: name what to learn from"),
        ("data: {path: x, held_out: 1}", "data.held_out: .* less than 1"),
        ("data: {path: x}\nlr: 3", "lr: unknown key"),
        ("data: {path: x}\nbatch: {sequences: 3}", "batch: sequences: 3: it must be a multiple of"),
        ("data: {path: x}\nsteps: 3\nschedule: {warmup_steps: 4}", "the run has only 3 steps"),
        ("data: {path: x}\ndata: {path: y}", "not YAML: .*data"),
        ("data: [", "not YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        loaded(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        load_train_spec(tmp_path / "none.yaml")


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_curves_are_those_of_transformers(kind: Kind) -> None:
    steps, warmup = 17, 5
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    linear = kind == "linear"
    make = get_linear_schedule_with_warmup if linear else get_cosine_schedule_with_warmup
    theirs = make(optimizer, warmup, steps)
    ours = Schedule(kind=kind, steps=steps, warmup_steps=warmup)
    for step in range(steps + 1):
        assert abs(ours.factor(step) - theirs.get_last_lr()[0]) < 1e-12
        optimizer.step()
        theirs.step()


def test_a_part_is_left_at_the_end() -> None:
    curve = Schedule(kind="cosine", steps=10, warmup_steps=2, last_part=0.25)
    assert [curve.factor(step) for step in (0, 1, 2)] == [0.0, 0.5, 1.0]
    assert abs(curve.factor(10) - 0.25) < 1e-12
    assert curve.factor(11) == curve.factor(10)
    assert Schedule(kind="constant", steps=3).factor(2) == 1.0
