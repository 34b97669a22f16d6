"""What a training run says of itself: a line of JSON for each step, evaluation, and return.

The lines are in one file, which grows. A step that was done again, after a checkpoint was taken
over, has another line; the last one counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from ...proto.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step that was committed."""

    step: int  # steps that are done with it
    loss: float  # mean over the tokens that are learned, in nats
    targets: int  # these tokens
    tokens: int  # all that were computed
    seconds: float  # from its first attempt to the commit
    lr: float  # of the first group
    grad_norm: float | None  # before clipping; None: the step was skipped
    workers: int
    attempts: int  # more than 1: something was lost
    balance_loss: float | None = None  # times its coefficient; None: there is none
    # Of the layer whose gates chose the least evenly, over the last steps; see `RoutingWatch`.
    entropy: float | None = None
    max_over_mean: float | None = None
    dead_experts: int | None = None
    collapsed: str | None = None  # which layers have collapsed, and what helps


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutRecord:
    """What the held-out sequences said after a step."""

    step: int
    held_out_loss: float  # mean over tokens, in nats
    held_out_targets: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.held_out_loss, 700.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReturnRecord:
    """The run has gone back to a checkpoint, because its state was lost."""

    step: int  # steps that are done with it
    lost: str  # what was lost

    @property
    def words(self) -> str:
        """It, for people."""
        return f"the run has gone back to its checkpoint after step {self.step}: {self.lost}"


Record = StepRecord | HeldOutRecord | ReturnRecord
_R = TypeVar("_R", StepRecord, HeldOutRecord, ReturnRecord)


def line_of(record: Record) -> str:
    """Return a record as a line of JSON, without its end."""
    return json.dumps(asdict(record))


def record_of(line: str) -> Record:
    """Return what a line says. Raises CheckpointError."""
    try:
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError("it is no object")
        if "held_out_loss" in values:
            return _made(HeldOutRecord, values)
        if "lost" in values:
            return _made(ReturnRecord, values)
        return _made(StepRecord, values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{line[:80]!r}: no record of a step: {error}") from error


def _made(kind: type[_R], values: dict[str, Any]) -> _R:
    known = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in known})


def history(records: Iterable[Record]) -> tuple[list[StepRecord], list[HeldOutRecord]]:
    """Return the steps and evaluations that count, by step, from the records in their order."""
    steps: dict[int, StepRecord] = {}
    held_out: dict[int, HeldOutRecord] = {}
    for one in records:
        if isinstance(one, HeldOutRecord):
            held_out[one.step] = one
            continue
        # What followed it was before a checkpoint was taken over.
        left = one.step - isinstance(one, StepRecord)
        steps = {step: old for step, old in steps.items() if step <= left}
        held_out = {step: old for step, old in held_out.items() if step <= left}
        if isinstance(one, StepRecord):
            steps[one.step] = one
    return list(steps.values()), list(held_out.values())
