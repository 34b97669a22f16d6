"""What the workers of a training run ask of the one that decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ....cluster.expert_keys import ExpertKey
from ....cluster.placement import HostEntry
from ....cluster.training.contributions import Attempt
from ....cluster.training.host_memory import HostMemory
from ....cluster.training.orders import GroupUpdate, RunId
from ....cluster.training.run_plan import RunPlan
from ....cluster.training.workers import Stand, Worker
from ....cluster.versions import WeightVersions


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """The hosts that have what a run trains, after the last commit."""

    run: RunId  # as hosts know it now
    versions: WeightVersions  # of the weights
    owning: Mapping[ExpertKey, tuple[HostEntry, ...]]  # the state and the masters
    having: Mapping[ExpertKey, tuple[HostEntry, ...]]  # the weights


class Restoring(NamedTuple):
    """A worker's part in taking over a checkpoint."""

    where: Where  # its state is to be put
    number: int  # of this worker, from 0 on
    workers: int  # that take it over


class Learned(NamedTuple):
    """What a worker has learned from in an attempt."""

    layers: frozenset[int]  # whose experts have gradients
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSums:
    """What the gradients of experts are, summed up over hosts and workers."""

    squares: Mapping[tuple[int, str], float]  # sums of squares, by layer and name in the pool
    not_finite: tuple[str, ...]  # a name for each gradient that has such values


@dataclass(frozen=True, slots=True, kw_only=True)
class TrunkSums:
    """What the trunk's gradients are, summed up over workers."""

    squares: Mapping[str, float]  # sums of squares, by parameter
    weight: float  # of all workers together


class Coordination(Protocol):
    """What a worker asks of its run. Each method may be called by several workers at once.

    From `again` to the next one, workers give the attempt that they take part in. Methods raise
    StepLost if it is over, ClusterError if the run is, and Superseded for a process that another
    one has replaced.
    """

    @property
    def plan(self) -> RunPlan: ...

    def enter(self, worker: Worker) -> Where | None:
        """Register a worker. The first one lets all hosts begin the run.

        It gets a `Where`, puts the trunk's weights into the owners, and calls `own`. The others
        get None, and read the weights there after `again`.
        """
        ...

    def own(self, worker: Worker) -> None:
        """Let owners begin: the weights are there."""
        ...

    def again(self, worker: Worker) -> Stand:
        """Wait for the next attempt, in which nothing is added up yet; see `Workers`.

        If the run is broken, what is returned says so.
        """
        ...

    def where(self, worker: Worker, attempt: Attempt | None = None) -> Where:
        """Return where things are; with ``attempt`` they stay there until it ends."""
        ...

    def reduce_experts(
        self,
        worker: Worker,
        attempt: Attempt,
        learned: Learned,
        put: frozenset[ExpertKey],
    ) -> ExpertSums:
        """Meet: end the backward calls, and sum the experts' gradients up.

        Layers from which no worker has ``learned`` are not updated. ``put`` are the experts whose
        gradients it has sent to their owners.
        """
        ...

    def reduce_trunk(
        self, worker: Worker, attempt: Attempt, put: frozenset[ExpertKey], weight: float
    ) -> TrunkSums:
        """Meet: sum up the gradients of the trunk's blocks that workers have put into owners."""
        ...

    def commit(
        self, worker: Worker, attempt: Attempt, groups: Mapping[int, GroupUpdate] | None
    ) -> Stand:
        """Meet: apply what is summed up, and begin the next attempt.

        Workers that have nothing to say of ``groups`` go along with the others. Raises BadInput if
        these disagree, and ClusterError if the step is done and not served yet.
        """
        ...

    def total(
        self, worker: Worker, attempt: Attempt, name: str, numbers: Sequence[float]
    ) -> list[float]:
        """Meet: return the sums of the workers' numbers; ``name`` is used once in an attempt.

        Raises BadInput if they are not equally many.
        """
        ...

    def forget(self, worker: Worker, checkpoint: str) -> Restoring:
        """Meet: let owners forget their state. Workers put a checkpoint's in its place.

        Nothing else goes on meanwhile, whatever has become of the attempt. Raises BadInput if they
        have different checkpoints.
        """
        ...

    def take_over(self, worker: Worker, step: int) -> Stand:
        """Meet: the checkpoint is there; go on after ``step``."""
        ...

    def leave(self, worker: Worker) -> None:
        """Take part no more; the last one ends the run."""
        ...

    @property
    def is_over(self) -> bool: ...

    @property
    def is_broken(self) -> bool:
        """Whether the run goes on from a checkpoint alone."""
        ...

    def planned_memory(self, *, lent: bool = False) -> dict[str, HostMemory]:
        """Return what each host takes for the run; ``lent``: workers compute all calls."""
        ...
