"""A training run in the process of a trunk: one of its workers.

The trunk's parameters are dealt into blocks, which hosts own like experts. In a step this process
sends their gradients to the owners and takes the new weights from there, so it keeps no state. What
is to be decided, a `Coordination` decides.
"""

from __future__ import annotations

import atexit
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...cluster.expert_keys import TRUNK, ExpertKey, is_shared
from ...cluster.placement import HostEntry
from ...cluster.training.orders import BulkKey, GroupUpdate, RunId
from ...cluster.training.workers import Stand, Worker
from ...cluster.versions import WeightVersions
from ...models.export.plan import plan_export
from ...models.export.training_checkpoint import TrainingCheckpoint, read_checkpoint
from ...proto.errors import (
    BadInput,
    CallError,
    ClusterError,
    MoesaicError,
    StateLost,
    StepLost,
    Superseded,
    describe_error,
)
from ..transport.bulk.links import BulkLinks
from .exact_gradients import ExactGradients
from .giving import GivenGradients
from .lead.coordination import Coordination, ExpertSums, Learned, TrunkSums, Where
from .lead.driver import PUBLISH_S, finish
from .learning import Learning
from .saving import LoadedRun, SavedRun, shard_bytes

log = logging.getLogger(__name__)

# How long a tensor may take to travel.
BULK_S = 120.0
# How often a checkpoint is taken over anew because workers come and go meanwhile.
_RESTORE_TRIES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningTrunk:
    """A trunk whose experts are in a pool, as a run needs it."""

    model: PreTrainedModel
    learning: Learning
    name: str  # of its router


class PoolRun:
    """A run as one of its workers has it, with the worker's trunk."""

    def __init__(
        self,
        lead: Coordination,
        links: BulkLinks,
        trunk: LearningTrunk,
        *,
        name: str | None = None,
    ) -> None:
        """Take part in the run; the trunk gets its weights, unless it is the first that gives them.

        ``lead`` decides for it. ``name`` is that of this worker (None: the trunk's). ``close`` ends
        this worker's part, and closes ``links``. Raises ClusterError.
        """
        self._lead = lead
        self._links = links
        self._trunk = trunk
        self._worker = Worker(name or trunk.name, secrets.randbits(63))
        self._plan = plan = lead.plan
        self._parameters = dict(trunk.model.named_parameters())
        self._blocks = {
            key: tuple(one.groups) for key, one in plan.tensors.items() if key.layer == TRUNK
        }
        experts = (key for key in plan.tensors if key.layer != TRUNK and not is_shared(key))
        self._experts = dict(sorted(Counter(key.layer for key in experts).items()))
        self._files = SavedRun(
            model=plan.model,
            trunk=trunk.model,
            trained=plan.tensors,
            blocks=self._blocks,
            read=self._reading,
        )
        self._saving: Future[None] | None = None
        self._stand: Stand | None = None
        self._has: WeightVersions | None = None  # the weights of the trunk
        self._where: Where | None = None  # as it was when an attempt or a checkpoint needed it
        self._sums: ExpertSums | None = None  # None: nothing is summed up yet
        self._learned: frozenset[int] = frozenset()  # layers, when it was
        self._renewed: Callable[[], None] = lambda: None
        self._given_trunk = False
        self._lost = ""  # why the attempt is over for this worker
        self._closed = False
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="bulk")
        self._given = GivenGradients(plan, self._worker.name, links, self._threads)
        trunk.learning.use(self._given.memory)
        trunk.learning.exact = plan.exact
        trained = [name for names in self._blocks.values() for name in names]
        exactly = {name: self._parameters[name] for name in trained if plan.exact}
        self._exact = ExactGradients(exactly)
        try:
            self._where = lead.enter(self._worker)
            if self._where is not None:
                self._each(self._blocks, self._put_weights)
                self._has = self._where.versions
                lead.own(self._worker)
            self._again()
            # Before Ray ends with the process: a thread that asks Ray then would crash it.
            atexit.register(self.close)
        except BaseException:
            self.close()
            raise

    # ---- what an optimizer asks -----------------------------------------------------------------

    @property
    def lead(self) -> Coordination:
        return self._lead

    @property
    def run(self) -> int:
        return self._now.attempt.run

    @property
    def is_over(self) -> bool:
        """Whether this worker has left, or the run takes no more orders."""
        return self._closed or self._lead.is_over

    @property
    def is_broken(self) -> bool:
        """Whether it goes on from a checkpoint alone."""
        return self._lead.is_broken

    @property
    def step(self) -> int:
        """The number of steps that were committed."""
        return self._now.step

    @property
    def number(self) -> int:
        """Which of the workers this is, from 0 on, in the attempt under way."""
        return self._now.number

    @property
    def workers(self) -> int:
        """How many take part in the attempt under way."""
        return self._now.workers

    @property
    def has_gradients(self) -> bool:
        """Whether gradients were added up since the last step, or since they were dropped."""
        return bool(self._trunk.learning.layers) or self._sums is not None

    @property
    def is_open(self) -> bool:
        """Whether the attempt goes on, so that there is something to add up to."""
        return self._trunk.learning.is_open

    def follow_weights(self, renewed: Callable[[], None]) -> None:
        """Call ``renewed()`` when the trunk has got weights, as of a step or a checkpoint."""
        self._renewed = renewed

    def assignments(self) -> dict[int, list[float]]:
        """Return how many rows of this worker each expert had in the attempt, by layer."""
        learning = self._trunk.learning
        return {layer: learning.assignments(layer, n) for layer, n in self._experts.items()}

    def squares(self) -> Mapping[tuple[int, str], float]:
        """Return the sum of squares of the experts' gradients, by layer and name in the pool.

        From now on no forward pass is learned from until `commit` or `drop`. Raises StepLost.
        """
        return self._reduced().squares

    def not_finite(self) -> tuple[str, ...]:
        """Return a name for each expert's gradient that `squares` has found not to be finite."""
        return self._reduced().not_finite

    def listen(self, learned: Callable[[int], None]) -> None:
        """Call ``learned(layer)`` whenever gradients of a layer's call were added up."""
        self._trunk.learning.learned = learned

    def give_trunk(self, trunk: Mapping[str, Tensor], weight: float = 1.0) -> TrunkSums:
        """Give the trunk's gradients, by the parameters' names, to their owners.

        Return what those of all workers are together. Parameters without a gradient keep their
        weights. Raises StepLost.
        """
        self._reduced()
        if self._plan.exact:
            trunk = self._exact.take(trunk)
        given = {
            key: {name: trunk[name] for name in names if name in trunk}
            for key, names in self._blocks.items()
        }
        given = {key: gradients for key, gradients in given.items() if gradients}
        attempt = self._now.attempt
        with self._attempt():
            finish(self._give(given))
            found = self._lead.reduce_trunk(self._worker, attempt, frozenset(given), weight)
        self._given_trunk = True
        return found

    def commit(
        self, groups: Mapping[int, GroupUpdate] | None, skipped: frozenset[int] = frozenset()
    ) -> None:
        """Apply the gradients; afterwards the pool serves the new weights and the trunk has them.

        None: as the other workers want it. Experts of layers ``skipped`` keep their weights. Raises
        StepLost, with all as it was, and ClusterError if the step was applied and the pool does not
        serve it yet.
        """
        if late := skipped & self._learned:
            raise CallError(
                f"layers {sorted(late)}: their gradients are in the norm already, and cannot "
                "be left out of the step; set them to None before the norm is taken"
            )
        assert self._given_trunk, "the trunk comes first"
        # What is lost before the step is applied, the lead says itself.
        with self._attempt(converts=False):
            self._await_saving()
            stand = self._lead.commit(self._worker, self._now.attempt, groups)
        self._begin(stand)

    def drop(self) -> None:
        """Forget the gradients that were added up; the next attempt begins.

        Raises StateLost if the run is broken, and ClusterError.
        """
        self._trunk.learning.end("its gradients were dropped")
        stand = self._again()
        if stand.broken:
            raise StateLost(stand.lost)

    def _again(self) -> Stand:
        stand = self._lead.again(self._worker)
        self._begin(stand)
        return stand

    def total(self, name: str, numbers: Sequence[float]) -> list[float]:
        """Return the sums of the workers' numbers; ``name`` is used once in an attempt."""
        with self._attempt():
            return self._lead.total(self._worker, self._now.attempt, name, numbers)

    # ---- checkpoints ----------------------------------------------------------------------------

    def save(
        self, folder: Path, *, max_shard_size: int | str | None = None, wait: bool = True
    ) -> Future[None]:
        """Write the model and all state after the last commit, so that `restore` can read it.

        The folder may exist, and other files in it stay. Without ``wait`` it is written beside the
        next step, whose commit waits for it; the result tells whether it was. Raises
        CheckpointError and UnsupportedModel.
        """
        self._await_saving()
        sizes = {} if max_shard_size is None else {"max_shard_bytes": shard_bytes(max_shard_size)}
        # In this thread: transformers builds a model for it.
        plan = plan_export(self._trunk.model, dtype=self._trunk.learning.dtype, **sizes)
        about = {"run": self.run, "optimizer": self._plan.optimizer}
        self._where = self._lead.where(self._worker)
        self._saving = self._threads.submit(
            self._files.write, folder, plan, step=self.step, about=about
        )
        if wait:
            self._saving.result()
        return self._saving

    def restore(self, folder: Path) -> None:
        """Take everything from a folder of `save`: experts, owners' state, the trunk's parameters.

        All workers do. What was added up is forgotten. Raises CheckpointError, with the pool as it
        was, StepLost if workers come and go again and again, and ClusterError.
        """
        checkpoint = read_checkpoint(folder)
        loaded = LoadedRun(checkpoint, self._files)
        self._where = self._lead.where(self._worker)
        loaded.check_frozen()
        self._await_saving()
        was_broken = self._lead.is_broken
        for left in reversed(range(_RESTORE_TRIES)):
            self._trunk.learning.end("a checkpoint is taken over")
            try:
                stand = self._take_over(checkpoint, loaded)
            except StepLost as error:
                if not left:
                    raise
                log.warning("%s: %s; it is tried again", folder, describe_error(error))
                stand = self._again()
                if stand.broken or not was_broken:
                    continue
                # The others have taken it over meanwhile.
            loaded.copy_frozen()
            self._begin(stand)
            return

    def _take_over(self, checkpoint: TrainingCheckpoint, loaded: LoadedRun) -> Stand:
        restoring = self._lead.forget(self._worker, checkpoint.digest)
        self._where = restoring.where
        for key in sorted(self._plan.tensors)[restoring.number :: restoring.workers]:
            self._put(BulkKey("state", key, run=restoring.where.run), loaded.state(key))
        return self._lead.take_over(self._worker, checkpoint.step)

    def _await_saving(self) -> None:
        """Wait until a checkpoint that is being written has read what a commit would change."""
        saving, self._saving = self._saving, None
        if saving is not None and (error := saving.exception()) is not None:
            log.error("a checkpoint could not be written: %s", describe_error(error))

    def close(self) -> None:
        """Take part no more; the last worker ends the run."""
        atexit.unregister(self.close)
        if self._closed:
            return
        self._closed = True
        self._trunk.learning.end("the training run was closed")
        self._await_saving()
        self._threads.shutdown(cancel_futures=True)
        self._lead.leave(self._worker)
        self._links.close()
        self._exact.close()
        self._trunk.learning.use(None)
        self._given.close()

    # ---- one step -------------------------------------------------------------------------------

    @property
    def _now(self) -> Stand:
        assert self._stand is not None, "no attempt has begun"
        return self._stand

    def _begin(self, stand: Stand) -> None:
        """Begin with an attempt; the trunk gets its weights, unless it has them."""
        self._stand, self._where = stand, None
        self._exact.clear()
        self._sums, self._given_trunk, self._lost = None, False, ""
        learning = self._trunk.learning
        if stand.placed is not None:
            learning.router.wait_placed(stand.placed, PUBLISH_S)
        if stand.versions != self._has and not stand.broken:
            self._each(self._blocks, self._get_weights)
            self._has = stand.versions
            self._renewed()
        if not stand.lost and not self._given.may_be_overwritten(stand.members):
            self._given.move()
            learning.use(self._given.memory)
        if stand.lost:
            learning.end(f"{stand.lost}; call zero_grad() to try again")
        else:
            learning.begin(stand.attempt)

    @contextmanager
    def _attempt(self, *, converts: bool = True) -> Iterator[None]:
        """Let any error end the attempt here, because gradients may be gone with it.

        With ``converts`` it becomes a StepLost.
        """
        if self._lost:
            raise StepLost(self._lost)
        try:
            yield
        except BaseException as error:
            why = f"{self._now.attempt} is lost: {describe_error(error)}"
            self._lost = f"{why}; the weights are those of the last step"
            self._trunk.learning.end(f"{why}; call zero_grad() to try again")
            final = isinstance(error, StepLost | BadInput | Superseded)
            ours = isinstance(error, MoesaicError) and not final
            if converts and ours and not self._lead.is_broken:
                raise StepLost(self._lost) from error
            raise

    def _reduced(self) -> ExpertSums:
        """Let the experts' gradients be summed up, once in an attempt."""
        if self._sums is not None:
            return self._sums
        learning, attempt = self._trunk.learning, self._now.attempt
        layers = learning.layers
        learning.end("the step's gradients are summed up; call step() or zero_grad() first")
        with self._attempt():
            tensors = self._plan.tensors
            own = {
                key: gradients
                for key, gradients in learning.take().items()
                if key in tensors and tensors[key].groups
            }
            self._where = self._lead.where(self._worker, attempt)
            finish(self._give(own))
            learned = Learned(layers, learning.tokens)
            found = self._lead.reduce_experts(self._worker, attempt, learned, frozenset(own))
        self._learned, self._sums = layers, found
        return found

    def _give(self, gradients: Mapping[ExpertKey, Mapping[str, Tensor]]) -> list[Future[None]]:
        return self._given.give(self._now.attempt, gradients, self._owning)

    def _owning(self, key: ExpertKey) -> Sequence[HostEntry]:
        assert self._where is not None
        return self._where.owning[key]

    def _put_weights(self, key: ExpertKey) -> None:
        given = BulkKey("weights", key, run=self._plan.run)
        self._put(given, {name: self._parameters[name].detach() for name in self._blocks[key]})

    def _put(self, given: BulkKey, tensors: Mapping[str, Tensor]) -> None:
        for entry in self._owning(given.key):
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
        error: MoesaicError | None = None
        # Things move between two commits, while a checkpoint is written.
        for again in (False, True):
            entries, versions, run = self._having(kind, key, again=again)
            wanted = BulkKey(kind, key, version=versions.of(key), run=run)
            for entry in entries:
                with ExitStack() as stack:
                    try:
                        found = stack.enter_context(
                            self._links.get(entry, wanted, timeout_s=BULK_S)
                        )
                    except MoesaicError as failure:
                        error = failure
                        continue
                    yield found
                    return
        raise ClusterError(f"{kind} of {key} cannot be read: {error}") from error

    def _having(
        self, kind: Literal["weights", "state"], key: ExpertKey, *, again: bool
    ) -> tuple[Sequence[HostEntry], WeightVersions, RunId]:
        """Return the hosts that have tensors of a key, and under which numbers.

        ``again``: as it is now.
        """
        trunk = self._now.trunk.get(key) if kind == "weights" else None
        if trunk is not None and not again:
            return trunk, self._now.versions, self.run
        where = self._where
        if where is None or again:
            where = self._where = self._lead.where(self._worker)
        hosts = where.having[key] if kind == "weights" else where.owning[key]
        return hosts, where.versions, where.run

    def _each(self, keys: Iterable[ExpertKey], act: Callable[[ExpertKey], None]) -> None:
        """Do something with keys side by side; raise the first error."""
        finish([self._threads.submit(act, key) for key in keys])
