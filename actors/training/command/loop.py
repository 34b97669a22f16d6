"""The loop of `moesaic train`, as each of its workers runs it.

A step's number is its place in the data, so whoever knows the number of steps that are done knows
what comes next. Whatever is lost, the loop asks the run where it stands, and goes on from there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace
from threading import Event
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ....cluster.expert_keys import LayerKey
from ....cluster.load.routing_watch import RoutingWatch
from ....cluster.train_command.records import (
    HeldOutRecord,
    Record,
    ReturnRecord,
    StepRecord,
    history,
)
from ....cluster.train_command.train_spec import TrainSpec
from ....models.data.dealt import Dealt
from ....models.data.sequences import sequence
from ....models.data.token_file import TokenFile
from ....models.training.balance_loss import Routed, balance_part, routed
from ....models.training.language_loss import Computed, compute
from ....proto.errors import (
    BadExpert,
    BadInput,
    CheckpointError,
    ClusterError,
    ExpertUnavailable,
    MoesaicError,
    NoRun,
    Retryable,
    StateLost,
    StepLost,
    Superseded,
    describe_error,
)
from ..optimizer import RunOptimizer
from ..training_run import Saving, TrainingRun
from .run_folder import RunFolder

log = logging.getLogger(__name__)

T = TypeVar("T")

# A step that fails so often in a row will fail again.
MOST_ATTEMPTS = 20
# A checkpoint that cannot be written so often in a row never can.
MOST_UNSAVED = 3
# How often a checkpoint is chosen anew because the other workers have chosen another one.
_CHOICES = 5


@dataclass(slots=True)
class _Sums:
    """What a worker has computed of a step."""

    loss: float = 0.0
    targets: int = 0
    tokens: int = 0
    balance_loss: float = 0.0
    kept: list[Computed] = field(default_factory=list)  # with an auxiliary loss, until its counts


class TrainingLoop:
    """One worker's part of a run, from the step where it stands to its last one."""

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: RunOptimizer,
        spec: TrainSpec,
        folder: RunFolder,
        *,
        experts_per_token: int,
        stop: Event,
    ) -> None:
        """Take an optimizer over the model; ``stop`` ends the loop after a step of all workers.

        Raises BadInput and CheckpointError for a file of tokens that cannot be used.
        """
        self._model: Any = model
        self._optimizer = optimizer
        self._spec = spec
        self._folder = folder
        self._per_token = experts_per_token
        self._stop = stop
        self._tokens = TokenFile(folder.tokens)
        self._dealt = Dealt(
            self._tokens,
            length=spec.data.sequence_length,
            per_step=spec.batch.sequences,
            held_out=spec.data.held_out,
            seed=spec.data.seed,
        )
        self._rates: list[float] = [group["lr"] for group in optimizer.param_groups]
        self._curve = spec.curve
        self._watch = RoutingWatch()
        self._began = time.monotonic()  # the step under way
        self._attempts = 1  # at it
        self._lost = False  # the attempt, and it is to begin anew
        self._unwritten: list[Record] = []  # which the worker that writes may not have written
        self._known: set[tuple[type, int]] | None = None  # what is recorded; None: not looked yet
        self._saving: tuple[int, Saving] | None = None
        self._saved_step: int | None = None  # None: not looked yet
        self._saved_at = time.monotonic()
        self._not_saved_in_a_row = 0
        optimizer.if_not_finite = (
            "Lower optimizer.settings.lr, or optimizer.max_grad_norm, and go on from the last "
            "checkpoint with --resume"
        )

    def run(self) -> None:
        """Train until the last step is done, or all are told to stop; a checkpoint is there then.

        Raises BadExpert, Superseded, CheckpointError, and what comes again and again.
        """
        try:
            self._until_done(self._resume)
            while not self._until_done(self._next):
                continue
        finally:
            self._tokens.close()

    def _until_done(self, act: Callable[[], T]) -> T:
        """Do something again until nothing is lost meanwhile."""
        while True:
            try:
                if self._lost:
                    self._begin_anew()
                return act()
            except BadExpert as error:
                advice = self._optimizer.if_not_finite
                said = str(error)
                raise BadExpert(said if advice in said else f"{said}. {advice}") from error
            except (Superseded, NoRun):
                raise
            except (StepLost, StateLost, ExpertUnavailable, ClusterError, Retryable) as error:
                self._lost = True
                self._attempts += 1
                if self._attempts > MOST_ATTEMPTS or self._run.is_over:
                    raise
                log.warning("step %d is done again: %s", self._run.step + 1, describe_error(error))

    def _begin_anew(self) -> None:
        try:
            self._optimizer.zero_grad()
        except StateLost as error:
            log.warning("the run goes back to its last checkpoint: %s", error)
            if self._folder.newest() is None:
                raise CheckpointError(f"{error}. No checkpoint was written yet") from error
            self._load()
            if self._run.number == 0:
                self._folder.add(ReturnRecord(step=self._run.step, lost=str(error)))
        self._lost = False

    @property
    def _run(self) -> TrainingRun:
        return self._optimizer.run

    # ---- from a checkpoint ----------------------------------------------------------------------

    def _resume(self) -> None:
        """Go on from the newest checkpoint, unless the run is under way already."""
        if self._run.is_broken:
            raise StateLost("the state of the run is lost")
        if self._run.step == 0 and self._folder.newest() is not None:
            self._load()

    def _load(self) -> None:
        for left in reversed(range(_CHOICES)):
            newest = self._folder.newest()
            assert newest is not None, "checkpoints are removed by the run alone"
            try:
                self._optimizer.load(newest.path)
                break
            except CheckpointError:
                raise
            except BadInput:
                if not left:
                    raise
                log.warning("another checkpoint has come meanwhile; the newest is chosen anew")
        log.info("the run goes on after step %d", self._run.step)
        self._known, self._unwritten, self._saved_step = None, [], None
        self._watch = RoutingWatch()

    # ---- one step -------------------------------------------------------------------------------

    def _next(self) -> bool:
        """Do what comes next; return whether that was the end."""
        run, step = self._run, self._run.step
        evaluation = self._spec.evaluation
        due = evaluation is not None and (
            step % evaluation.every_steps == 0 or step == self._spec.steps
        )
        done = due and step in self._evaluations()
        # Workers are told to stop one after the other.
        done, stops = run.total("begin", (float(done), float(self._stop.is_set())))
        leads = run.number == 0
        if leads:
            self._catch_up(step)
            self._keep_saved()
        if due and not done and self._dealt.held_out:
            self._evaluate(step, leads=leads)
        if step >= self._spec.steps or stops:
            if leads:
                self._save_last(step)
            run.total("end", ())
            return True
        if leads and self._is_save_due(step):
            self._save(step)
        self._step(step, leads=leads)
        return False

    def _step(self, step: int, *, leads: bool) -> None:
        run, optimizer = self._run, self._optimizer
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._curve.factor(step)
        sums = _Sums()
        for numbers in self._mine(self._dealt.numbers(step)):
            self._forward(numbers, sums)
        if self._spec.balance_loss is not None:
            self._backward_balanced(sums, self._spec.balance_loss)
        counts = run.assignments()
        loss, targets, tokens, balance, *of_experts = run.total(
            "step",
            (
                *(sums.loss, sums.targets, sums.tokens, sums.balance_loss),
                *(count for layer in counts.values() for count in layer),
            ),
        )
        self._look_at(of_experts, [len(layer) for layer in counts.values()], list(counts))
        record = self._recorded(
            step=step + 1,
            loss=loss / targets,
            targets=int(targets),
            tokens=int(tokens),
            seconds=0.0,
            lr=optimizer.param_groups[0]["lr"],
            grad_norm=None,
            workers=run.workers,
            attempts=self._attempts,
            balance_loss=balance if self._spec.balance_loss is not None else None,
        )

        def decided(norm: float) -> None:
            nonlocal record
            seconds = time.monotonic() - self._began
            record = replace(record, grad_norm=norm, seconds=seconds)
            if leads:
                self._folder.pend(record)

        optimizer.decided = decided
        optimizer.step(weight=sums.targets)
        self._unwritten.append(record)
        self._began, self._attempts = time.monotonic(), 1
        if leads:
            self._catch_up(step + 1)

    def _mine(self, numbers: Sequence[int]) -> list[Sequence[int]]:
        """Return this worker's microbatches of some sequences."""
        size, run = self._spec.batch.microbatch, self._run
        microbatches = [numbers[begin : begin + size] for begin in range(0, len(numbers), size)]
        return microbatches[run.number :: run.workers]

    def _read(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        length, device = self._spec.data.sequence_length, self._model.device
        rows = [sequence(self._tokens, number, length) for number in numbers]
        ids_BS, labels_BS = (torch.stack(column) for column in zip(*rows, strict=True))
        return ids_BS.to(device), labels_BS

    def _forward(self, numbers: Sequence[int], sums: _Sums) -> None:
        """Compute a microbatch, and its gradients unless they wait for the counts of all."""
        balanced = self._spec.balance_loss is not None
        ids_BS, labels_BS = self._read(numbers)
        found = compute(self._model, ids_BS, labels_BS, gates=balanced)
        sums.loss += found.loss.item()
        sums.targets += found.targets
        sums.tokens += ids_BS.numel()
        if balanced:
            sums.kept.append(found)
        else:
            found.loss.backward()

    def _backward_balanced(self, sums: _Sums, coefficient: float) -> None:
        """Compute the gradients with the auxiliary loss of the whole step.

        It needs the counts of all rows of the step before the first gradient.
        """
        experts = max((len(layer) for layer in self._run.assignments().values()), default=0)
        mine = torch.zeros(1 + experts, dtype=torch.float64)
        for found in sums.kept:
            mine += torch.tensor(routed(found.gates_RE, self._per_token).numbers)
        targets, *numbers = self._run.total("routed", (sums.targets, *mine.tolist()))
        of_step = Routed.of(numbers)
        for found in sums.kept:
            part = coefficient * balance_part(found.gates_RE, of_step)
            # The step divides what it sums up by the number of its targets.
            (found.loss + part * targets).backward()
            sums.balance_loss += part.item()
        sums.kept.clear()

    def _look_at(
        self, of_experts: Sequence[float], sizes: Sequence[int], layers: Sequence[int]
    ) -> None:
        begin = 0
        for layer, size in zip(layers, sizes, strict=True):
            counts_E = of_experts[begin : begin + size]
            self._watch.add(LayerKey("", layer), counts_E, experts_per_token=self._per_token)
            begin += size

    def _recorded(self, **values: Any) -> StepRecord:
        worst = self._watch.worst("")
        if worst is not None:
            values |= {
                "entropy": worst.entropy,
                "max_over_mean": worst.max_over_mean,
                "dead_experts": worst.dead_experts,
                "collapsed": self._watch.warning(""),
            }
        return StepRecord(**values)

    # ---- beside the steps -----------------------------------------------------------------------

    def _evaluations(self) -> set[int]:
        """Return the steps after which the run was evaluated, as its records say."""
        _, found = history(self._folder.records()[0])
        return {one.step for one in found}

    def _catch_up(self, step: int) -> None:
        """Write what is not recorded yet of what has led to ``step``; its writer may be gone."""
        if self._known is None:
            steps, held_out = history(self._folder.records()[0])
            # What was recorded after this step is done again.
            self._known = {(type(one), one.step) for one in [*steps, *held_out] if one.step <= step}
            if (pending := self._folder.pending()) is not None and pending.step == step:
                self._unwritten.append(pending)
        for one in self._unwritten:
            if one.step <= step and (type(one), one.step) not in self._known:
                self._folder.add(one)
                self._known.add((type(one), one.step))
        self._unwritten.clear()

    def _evaluate(self, step: int, *, leads: bool) -> None:
        evaluation = self._spec.evaluation
        assert evaluation is not None
        loss, targets = 0.0, 0
        self._model.eval()
        try:
            with torch.no_grad():
                for numbers in self._mine(self._dealt.held_out[: evaluation.sequences]):
                    found = compute(self._model, *self._read(numbers))
                    loss, targets = loss + found.loss.item(), targets + found.targets
        finally:
            self._model.train()
        loss, targets = self._run.total("held out", (loss, targets))
        self._unwritten.append(
            HeldOutRecord(step=step, held_out_loss=loss / targets, held_out_targets=int(targets))
        )
        if leads:
            self._catch_up(step)
        self._began = time.monotonic()

    def _is_save_due(self, step: int) -> bool:
        given = self._spec.checkpoints
        if self._saved_step is None:
            newest = self._folder.newest()
            if newest is None:
                return True  # the run goes back to where it has begun, if it has to
            self._saved_step = newest.step
        if step <= self._saved_step:
            return False
        minutes = (time.monotonic() - self._saved_at) / 60
        by_steps = given.every_steps is not None and step - self._saved_step >= given.every_steps
        return by_steps or (given.every_minutes is not None and minutes >= given.every_minutes)

    def _save(self, step: int) -> None:
        """Begin to write a checkpoint beside the step that follows."""
        self._keep_saved(wait=True)
        try:
            saving = self._optimizer.save(self._folder.checkpoint(step), wait=False)
        except (StepLost, StateLost):
            raise
        except (CheckpointError, ClusterError, Retryable) as error:
            self._not_saved(step, error)
            return
        self._saving = step, saving
        self._saved_step, self._saved_at = step, time.monotonic()

    def _save_last(self, step: int) -> None:
        """Write a checkpoint of now, unless there is one. Raises CheckpointError."""
        self._keep_saved(wait=True)
        while (newest := self._folder.newest()) is None or newest.step != step:
            self._save(step)
            self._keep_saved(wait=True)

    def _keep_saved(self, *, wait: bool = False) -> None:
        """Take note of a checkpoint that was written, and remove those that are too many."""
        if self._saving is None or not (wait or self._saving[1].done()):
            return
        (step, saving), self._saving = self._saving, None
        try:
            saving.result()
        except (MoesaicError, CancelledError, OSError) as error:
            self._not_saved(step, error)
            return
        self._not_saved_in_a_row = 0
        self._folder.keep_last(self._spec.checkpoints.keep)
        log.info("the checkpoint after step %d is on the disk", step)

    def _not_saved(self, step: int, error: BaseException) -> None:
        """Try again later: a host may be lost while it is read. Raises CheckpointError."""
        self._saved_step = None
        self._not_saved_in_a_row += 1
        why = f"the checkpoint after step {step} could not be written: {describe_error(error)}"
        if self._not_saved_in_a_row >= MOST_UNSAVED:
            raise CheckpointError(why) from error
        log.warning("%s; it is tried again", why)
