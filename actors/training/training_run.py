"""What an optimizer asks of the run that trains a pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ...cluster.training.orders import GroupUpdate
from .lead.coordination import TrunkSums


class Saving(Protocol):
    """A checkpoint that is being written, or was."""

    def done(self) -> bool:
        """Return whether it was written, or could not be."""
        ...

    def result(self, timeout: float | None = None) -> None:
        """Return when all of it is on the disk.

        Raises CheckpointError if it could not be written, and TimeoutError after so many seconds.
        """
        ...

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what `result` raises, or None."""
        ...


class TrainingRun(Protocol):
    """A run over a pool, with hosts that own what is trained.

    Methods raise StepLost if hosts were lost before the commit: all that was added up is lost with
    them, the pool stands at the last commit, and `drop` begins the next attempt.
    """

    @property
    def run(self) -> int:
        """Its number, which grows from run to run."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether it takes no more orders."""
        ...

    @property
    def is_broken(self) -> bool:
        """Whether state is lost, so that it goes on from a checkpoint alone (`restore`)."""
        ...

    @property
    def step(self) -> int:
        """How many steps were committed."""
        ...

    @property
    def number(self) -> int:
        """Which of the run's workers this process is, from 0 on."""
        ...

    @property
    def workers(self) -> int:
        """How many take part."""
        ...

    @property
    def has_gradients(self) -> bool:
        """Whether a backward call began since the last commit or `drop`, even one that failed."""
        ...

    @property
    def is_open(self) -> bool:
        """Whether the attempt goes on, so that there is something to add up to."""
        ...

    def listen(self, learned: Callable[[int], None]) -> None:
        """Call ``learned(layer)`` whenever the gradients of a layer's call were added up."""
        ...

    def follow_weights(self, renewed: Callable[[], None]) -> None:
        """Call ``renewed()`` when the trunk has got weights, as of a step or a checkpoint."""
        ...

    def assignments(self) -> Mapping[int, Sequence[float]]:
        """Return how many rows of this worker each expert had in the attempt, by layer."""
        ...

    def squares(self) -> Mapping[tuple[int, str], float]:
        """Return the sum of squares of the experts' gradients, by layer and name in the pool.

        It is over all experts of the layer, and over each once, however many replicas it has. Only
        what is trained is in it. Asking ends the collection of gradients; asked again in the same
        attempt, it answers the same at once.
        """
        ...

    def not_finite(self) -> tuple[str, ...]:
        """Return a name for each expert's gradient that `squares` has found not to be finite."""
        ...

    def give_trunk(self, trunk: Mapping[str, Tensor], weight: float) -> TrunkSums:
        """Sum the trunk's gradients up over workers, after `squares`.

        ``trunk`` has those of this worker, by parameter. Parameters without any keep their values
        and their state. Return the sums of squares, and of the workers' weights.
        """
        ...

    def commit(self, groups: Mapping[int, GroupUpdate] | None, skipped: frozenset[int]) -> None:
        """Apply the gradients everywhere; the model's parameters have their new values afterwards.

        The experts of the layers in ``skipped`` keep their values and their state. With groups of
        None this worker has no gradients, and goes along with the others.
        """
        ...

    def total(self, name: str, numbers: Sequence[float]) -> list[float]:
        """Return the sums of the workers' numbers; ``name`` is used once in an attempt."""
        ...

    def drop(self) -> None:
        """Forget what was added up; what follows belongs to a new attempt."""
        ...

    def save(
        self, folder: Path, *, max_shard_size: int | str | None = None, wait: bool = True
    ) -> Saving:
        """Write the model and all state after the last commit, so that `restore` can read it.

        The folder may exist, and other files in it stay. ``max_shard_size`` is that of
        `save_pretrained`, None its default. Without ``wait`` it is written beside the next step.
        """
        ...

    def restore(self, folder: Path) -> None:
        """Take everything from a folder of `save`: experts, owners' state, the model's parameters.

        What was added up is forgotten.
        """
        ...

    def close(self) -> None:
        """End the run. The pool goes on to serve the last committed weights."""
        ...
