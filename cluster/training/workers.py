"""The workers of a run: who takes part in an attempt, and where all of them have come to.

An attempt at a step is computed by one or more processes. It begins when every worker that is known
waits for it, and there are as many as the run wants. In it workers meet: what the run decides is
decided when all have come to the same point, by what each of them brings. A worker that is gone
before that, or that waits for the next attempt already, ends the attempt for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...proto.errors import BadInput, Superseded
from ..expert_keys import ExpertKey
from ..placement import HostEntry, PlacementId
from ..versions import WeightVersions
from .contributions import Attempt

# How long a worker of another process may not be heard before it counts as gone.
WORKER_LEASE_S = 5.0


class Worker(NamedTuple):
    """One process that takes part."""

    name: str  # hosts know its gradients by it; at one time no other process has it
    token: int  # a random number: which process has the name


@dataclass(frozen=True, slots=True, kw_only=True)
class Stand:
    """Where a run stands when an attempt begins, for one of the workers that take part."""

    attempt: Attempt
    step: int  # steps that were committed
    versions: WeightVersions  # of the weights after the last of them
    placed: PlacementId | None  # a placement that names these versions; None: it is known already
    lost: str  # why the attempt is lost from the beginning; empty if it is not
    broken: bool = False  # whether it is, because the run goes on from a checkpoint alone
    members: frozenset[tuple[str, int]]  # hosts that take part, with their incarnations
    trunk: Mapping[ExpertKey, tuple[HostEntry, ...]]  # hosts that have the trunk's blocks
    number: int  # of this worker, from 0 on
    workers: int  # that take part


@dataclass(slots=True)
class _Known:
    token: int
    heard: float
    waits: bool  # for the next attempt


class Workers:
    """Who takes part, from one attempt to the next. Times are those of one clock, in seconds."""

    def __init__(self, least: int = 1, *, lease_s: float = WORKER_LEASE_S) -> None:
        """Begin without workers; an attempt takes at least ``least``."""
        self.least = least
        self.part: tuple[str, ...] = ()  # who takes part in the attempt under way; sorted
        self._lease_s = lease_s
        self._known: dict[str, _Known] = {}
        self._replaced: set[int] = set()  # tokens of processes whose place another one has taken
        self._meetings: dict[str, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def enter(self, worker: Worker, now: float) -> None:
        """Take note of a worker that is about to take part. Raises Superseded as `wait`."""
        self._note(worker, now, waits=False)

    def wait(self, worker: Worker, now: float) -> None:
        """Let a worker wait for the next attempt: it is new, or has given up the one under way.

        Raises Superseded for a process whose name another one has by now.
        """
        self._note(worker, now, waits=True)

    def hear(self, worker: Worker, now: float) -> None:
        """Take note that a worker lives. Raises Superseded as `wait`."""
        self._check(worker)
        if (known := self._known.get(worker.name)) is not None:
            known.heard = now

    def leave(self, worker: Worker) -> bool:
        """Forget a worker, which does not take part any more; return whether it was known."""
        known = self._known.get(worker.name)
        if known is None or known.token != worker.token:
            return False
        del self._known[worker.name]
        return True

    def expire(self, now: float) -> list[str]:
        """Forget the workers that were not heard for too long; return them."""
        silent = [name for name, one in self._known.items() if now - one.heard >= self._lease_s]
        for name in silent:
            del self._known[name]
        return silent

    # ---- the attempt under way ------------------------------------------------------------------

    def takes_part(self, worker: Worker) -> bool:
        known = self._known.get(worker.name)
        return (
            worker.name in self.part
            and known is not None
            and known.token == worker.token
            and not known.waits
        )

    @property
    def missing(self) -> str:
        """Why the attempt under way cannot go on, because of a worker; empty if it can."""
        for name in self.part:
            if name not in self._known:
                return f"{name} is gone"
            if self._known[name].waits:
                return f"{name} has begun anew"
        return ""

    def meet(self, worker: Worker, where: str, brings: Any) -> Mapping[str, Any] | None:
        """Take note that a worker has come to a point; it may say so again.

        Return what each worker brings when all have come, sorted by their names; otherwise None.
        Raises BadInput if it says something else than before.
        """
        assert self.takes_part(worker), worker
        there = self._meetings.setdefault(where, {})
        if there.setdefault(worker.name, brings) != brings:
            raise BadInput(
                f"{where}: {worker.name} has said {there[worker.name]} in this attempt, and says "
                f"{brings} now; each question is asked once in an attempt"
            )
        return dict(sorted(there.items())) if len(there) == len(self.part) else None

    # ---- the next one ---------------------------------------------------------------------------

    @property
    def may_begin(self) -> bool:
        """Whether the next attempt can begin."""
        return len(self._known) >= max(self.least, 1) and all(
            one.waits for one in self._known.values()
        )

    def stay(self) -> None:
        """Let all that take part wait for the next attempt, as the step is done."""
        for name in self.part:
            if name in self._known:
                self._known[name].waits = True

    def begin(self) -> None:
        """Take note that an attempt has begun; all that wait for it take part."""
        self._take_part([name for name, one in self._known.items() if one.waits])

    @property
    def has_enough(self) -> bool:
        """Whether those that wait are as many as the run wants."""
        return sum(one.waits for one in self._known.values()) >= max(self.least, 1)

    def gather(self, caller: Worker) -> None:
        """Let all that do not wait take part, as the attempt under way does not matter any more."""
        if caller.name in self._known:
            self._known[caller.name].waits = False
        self._take_part([name for name, one in self._known.items() if not one.waits])

    def end_meeting(self, where: str) -> None:
        """Let a meeting begin anew, should anybody come."""
        self._meetings.pop(where, None)

    def fail(self) -> None:
        """No attempt could begin: whoever wants one waits for it anew."""
        self.part = ()
        for one in self._known.values():
            one.waits = False

    def _take_part(self, names: Iterable[str]) -> None:
        self._meetings.clear()
        self.part = tuple(sorted(names))
        for name in self.part:
            self._known[name].waits = False

    def _note(self, worker: Worker, now: float, *, waits: bool) -> None:
        self._check(worker)
        if (known := self._known.get(worker.name)) is not None and known.token != worker.token:
            self._replaced.add(known.token)
        self._known[worker.name] = _Known(worker.token, now, waits)

    def _check(self, worker: Worker) -> None:
        if worker.token in self._replaced:
            raise Superseded(
                f"{worker.name}: another process takes part under this name by now; end this one"
            )
