"""A training run in the process of a trunk: it carries out what `TrainingSteps` decides.

The trunk's parameters are dealt into blocks, which hosts own like experts. In a step this process
sends their gradients to the owners and takes the new weights from there, so it keeps no state.
"""

from __future__ import annotations

import atexit
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...cluster.expert_keys import TRUNK, ExpertKey
from ...cluster.training.host_memory import HostMemory
from ...cluster.training.orders import BulkKey, GroupUpdate, RunId
from ...cluster.training.steps import Squares, TrainingSteps
from ...models.export.plan import plan_export
from ...models.export.training_checkpoint import read_checkpoint
from ...proto.errors import (
    CallError,
    ClusterError,
    MoesaicError,
    describe_error,
)
from ..transport.bulk.links import BulkLinks
from .driver import PUBLISH_S, RunDriver, TrainingPool, finish
from .giving import GivenGradients
from .learning import Learning
from .saving import LoadedRun, SavedRun, shard_bytes

log = logging.getLogger(__name__)

# How long a tensor may take to travel.
BULK_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningTrunk:
    """A trunk whose experts are in a pool, as a run needs it."""

    model: PreTrainedModel
    learning: Learning
    name: str  # of its router, and of the source of its gradients


class PoolRun:
    """A run with one trunk, in whose process it is."""

    def __init__(
        self,
        pool: TrainingPool,
        links: BulkLinks,
        trunk: LearningTrunk,
        steps: TrainingSteps,
        *,
        since: RunId | None = None,
    ) -> None:
        """Begin the run, with the weights that are served and those of the trunk.

        With ``since`` it goes on with what this run began, in the place of a process that is gone:
        the trunk gets the weights of the last commit. ``close`` ends it, and closes ``links``.
        Raises ClusterError.
        """
        self._pool = pool
        self._links = links
        self._trunk = trunk
        self._steps = steps
        self._plan = plan = steps.plan
        self._parameters = dict(trunk.model.named_parameters())
        self._blocks = {
            key: tuple(one.groups) for key, one in plan.tensors.items() if key.layer == TRUNK
        }
        self._files = SavedRun(
            model=plan.model,
            trunk=trunk.model,
            trained=plan.tensors,
            blocks=self._blocks,
            read=self._reading,
        )
        self._saving: Future[None] | None = None
        self._served = steps.versions
        self._without: frozenset[int] | None = None  # layers; None: nothing is summed up yet
        self._squares: Squares = {}
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="bulk")
        self._given = GivenGradients(plan, trunk.name, links, self._threads)
        trunk.learning.use(self._given.memory)
        self._driver = RunDriver(pool, steps)
        try:
            if since is None:
                self._driver.exchange(self._steps.open())
                self._each(self._blocks, self._put_weights)
                self._driver.exchange(self._steps.own())
                self._begun()
            else:
                self._driver.exchange(self._steps.succeed(since))
                self._go_on()
            self._driver.start()
            # Before Ray ends with the process: a thread that asks Ray then would crash it.
            atexit.register(self.close)
        except BaseException as error:
            if since is not None:
                # Hosts keep what they have for whoever tries next.
                self._driver.over = ClusterError(
                    f"run {plan.run} has not begun: {describe_error(error)}"
                )
            self.close()
            raise

    # ---- what an optimizer asks -----------------------------------------------------------------

    @property
    def run(self) -> int:
        return self._plan.run

    @property
    def is_over(self) -> bool:
        """Whether the run was closed, or a newer one has taken its place."""
        return self._driver.over is not None

    @property
    def is_broken(self) -> bool:
        """Whether it goes on from a checkpoint alone."""
        return bool(self._steps.broken)

    @property
    def step(self) -> int:
        """The number of steps that were committed."""
        return self._steps.step

    @property
    def has_gradients(self) -> bool:
        """Whether gradients were added up since the last step, or since they were dropped."""
        return bool(self._trunk.learning.layers) or self._without is not None

    def planned_memory(self, *, lent: bool = False) -> dict[str, HostMemory]:
        """Return what each host takes for the run; ``lent``: this process computes all calls."""
        with self._driver.lock:
            return self._steps.planned_memory(lent=lent)

    def squares(self) -> dict[tuple[int, str], float]:
        """Return the sum of squares of the experts' gradients, by layer and name in the pool.

        From now on no forward pass is learned from until `commit` or `drop`. Raises StepLost.
        """
        with self._driver.lock:
            self._driver.check()
            self._reduce_experts()
            found: dict[tuple[int, str], list[float]] = {}
            for key, named in self._squares.items():
                for name, square in named.items():
                    found.setdefault((key.layer, name), []).append(square)
        return {where: math.fsum(squares) for where, squares in found.items()}

    def not_finite(self) -> tuple[str, ...]:
        """Return a name for each expert's gradient that `squares` has found not to be finite."""
        return tuple(
            f"{name} of {key}"
            for key, named in self._squares.items()
            for name, square in named.items()
            if not math.isfinite(square)
        )

    def listen(self, learned: Callable[[int], None]) -> None:
        """Call ``learned(layer)`` whenever gradients of a layer's call were added up."""
        self._trunk.learning.learned = learned

    def commit(
        self,
        groups: Mapping[int, GroupUpdate],
        trunk: Mapping[str, Tensor],
        skipped: frozenset[int] = frozenset(),
    ) -> None:
        """Apply the gradients; afterwards the pool serves the new weights and the trunk has them.

        ``trunk`` has its gradients by the parameters' names; others keep their weights, as do the
        experts of layers ``skipped``. Raises StepLost, with all as it was, and ClusterError if the
        step was applied and the pool does not serve it yet.
        """
        with self._driver.lock:
            self._driver.check()
            self._reduce_experts()
            assert self._without is not None
            if late := skipped - self._without:
                raise CallError(
                    f"layers {sorted(late)}: their gradients are in the norm already, and cannot "
                    "be left out of the step; set them to None before the norm is taken"
                )
            with self._driver.attempt():
                room = self._threads.submit(self._driver.await_room)
                given = {
                    key: {name: trunk[name] for name in names if name in trunk}
                    for key, names in self._blocks.items()
                }
                given = {key: gradients for key, gradients in given.items() if gradients}
                finish(self._give(given))
                self._driver.exchange(self._steps.reduce_trunk(list(given), self._trunk.name))
                self._await_saving()
                room.result()
                self._driver.exchange(self._steps.commit(groups))
            self._settle()

    def drop(self) -> None:
        """Forget the gradients that were added up; the next attempt begins.

        Raises ClusterError if the run cannot go on.
        """
        with self._driver.lock:
            self._driver.check()
            self._trunk.learning.end("its gradients were dropped")
            if self._served != self._steps.versions and not self._steps.broken:
                self._settle()
                return
            self._driver.exchange(self._steps.again(self._pool.now()))
            self._begun()

    # ---- checkpoints ----------------------------------------------------------------------------

    def save(
        self, folder: Path, *, max_shard_size: int | str | None = None, wait: bool = True
    ) -> Future[None]:
        """Write the model and all state after the last commit, so that `restore` can read it.

        The folder may exist, and other files in it stay. Without ``wait`` it is written beside the
        next step, whose commit waits for it; the result tells whether it was. Raises
        CheckpointError and UnsupportedModel.
        """
        with self._driver.lock:
            self._driver.check()
            self._await_saving()
            sizes = (
                {} if max_shard_size is None else {"max_shard_bytes": shard_bytes(max_shard_size)}
            )
            # In this thread: transformers builds a model for it.
            plan = plan_export(self._trunk.model, dtype=self._trunk.learning.dtype, **sizes)
            about = {"run": self.run, "optimizer": self._plan.optimizer}
            self._saving = self._threads.submit(
                self._files.write, folder, plan, step=self.step, about=about
            )
            if wait:
                self._saving.result()
            return self._saving

    def restore(self, folder: Path) -> None:
        """Take everything from a folder of `save`: experts, owners' state, the trunk's parameters.

        What was added up is forgotten. Raises CheckpointError, with the pool as it was, and
        ClusterError.
        """
        with self._driver.lock:
            self._driver.check()
            checkpoint = read_checkpoint(folder)
            loaded = LoadedRun(checkpoint, self._files)
            loaded.check_frozen()
            self._await_saving()
            self._trunk.learning.end("a checkpoint is taken over")
            if self._steps.versions != self._served:
                # A checkpoint was taken over in part; hosts have room when it is gone.
                self._pool.now(skip=self._steps.versions.models[self._plan.model])
                self._driver.await_room()
            self._driver.exchange(self._steps.forget(self._pool.now()))
            for key in self._plan.tensors:
                given = BulkKey("state", key, run=self.run)
                self._put(given, loaded.state(key))
            self._driver.exchange(self._steps.take_over(checkpoint.step))
            loaded.copy_frozen()
            self._settle()

    def _await_saving(self) -> None:
        """Wait until a checkpoint that is being written has read what a commit would change."""
        saving, self._saving = self._saving, None
        if saving is not None and (error := saving.exception()) is not None:
            log.error("a checkpoint could not be written: %s", describe_error(error))

    def close(self) -> None:
        """End the run; hosts forget what they own for it, and keep the weights."""
        atexit.unregister(self.close)
        self._driver.stop()
        self._trunk.learning.end("the training run was closed")
        self._await_saving()
        self._threads.shutdown(cancel_futures=True)
        self._driver.end()
        self._links.close()
        self._trunk.learning.use(None)
        self._given.close()

    # ---- one step -------------------------------------------------------------------------------

    def _reduce_experts(self) -> None:
        if self._without is not None:
            return
        learning = self._trunk.learning
        every = {key.layer for key in self._plan.tensors if key.layer != TRUNK}
        without = frozenset(every - learning.layers)
        learning.end("the step's gradients are summed up; call step() or zero_grad() first")
        with self._driver.attempt():
            tensors = self._plan.tensors
            own = {
                key: gradients
                for key, gradients in learning.take().items()
                if key in tensors and tensors[key].groups
            }
            put = {self._trunk.name: frozenset(own)}
            giving = self._give(own)
            reduction = self._steps.reduce_experts(without, put=put)
            self._squares = self._driver.exchange(reduction, beside=giving)
        self._without = without

    def _settle(self) -> None:
        """Serve what was committed, take the trunk's new weights, and begin the next attempt."""
        steps = self._steps
        self._pool.publish(steps.versions.models[self._plan.model], PUBLISH_S)
        getting = self._start(self._blocks, self._get_weights)
        self._driver.exchange(steps.begin(), beside=getting)
        finish(getting)
        self._served = steps.versions
        self._begun()

    def _go_on(self) -> None:
        """Begin with what another process has committed."""
        if self._served != self._steps.versions:
            self._settle()  # it has not published it
        else:
            self._pool.now(skip=self._steps.skipped)
            self._each(self._blocks, self._get_weights)
            self._begun()

    def _begun(self) -> None:
        self._without, self._squares = None, {}
        if not self._steps.lost and not self._given.may_be_overwritten(self._steps.members):
            self._given.move()
            self._trunk.learning.use(self._given.memory)
        if lost := self._steps.lost:
            self._trunk.learning.end(f"{lost}; call zero_grad() to try again")
        else:
            self._trunk.learning.begin(self._steps.attempt)

    def _put_weights(self, key: ExpertKey) -> None:
        given = BulkKey("weights", key, run=self.run)
        self._put(given, {name: self._parameters[name].detach() for name in self._blocks[key]})

    def _give(self, gradients: Mapping[ExpertKey, Mapping[str, Tensor]]) -> list[Future[None]]:
        return self._given.give(self._steps.attempt, gradients, self._steps.owning)

    def _put(self, given: BulkKey, tensors: Mapping[str, Tensor]) -> None:
        for entry in self._steps.owning(given.key):
            self._links.put(entry, given, tensors, timeout_s=BULK_S)

    def _get_weights(self, key: ExpertKey) -> None:
        with self._reading("weights", key) as tensors, torch.no_grad():
            for name in self._blocks[key]:
                self._parameters[name].copy_(tensors[name])

    @contextmanager
    def _reading(
        self, kind: Literal["weights", "state"], key: ExpertKey
    ) -> Iterator[Mapping[str, Tensor]]:
        """Return tensors of a key after the last commit, from the first host that answers."""
        steps = self._steps
        wanted = BulkKey(kind, key, version=steps.versions.of(key), run=self.run)
        error: MoesaicError | None = None
        for entry in steps.having(key) if kind == "weights" else steps.owning(key):
            with ExitStack() as stack:
                try:
                    found = stack.enter_context(self._links.get(entry, wanted, timeout_s=BULK_S))
                except MoesaicError as failure:
                    error = failure
                    continue
                yield found
                return
        raise ClusterError(f"{kind} of {key} cannot be read: {error}") from error

    def _each(self, keys: Iterable[ExpertKey], act: Callable[[ExpertKey], None]) -> None:
        """Do something with keys side by side; raise the first error."""
        finish(self._start(keys, act))

    def _start(
        self, keys: Iterable[ExpertKey], act: Callable[[ExpertKey], None]
    ) -> list[Future[None]]:
        return [self._threads.submit(act, key) for key in keys]
