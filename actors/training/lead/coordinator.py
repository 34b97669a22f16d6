"""Decides for the workers of a run: it drives the hosts, and brings the workers together."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotInTime
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from ....cluster.expert_keys import TRUNK, ExpertKey
from ....cluster.placement import PlacementId
from ....cluster.training.contributions import Attempt
from ....cluster.training.host_memory import HostMemory
from ....cluster.training.orders import GroupUpdate, RunId
from ....cluster.training.progress import RunProgress, RunTelling
from ....cluster.training.run_plan import RunPlan
from ....cluster.training.steps import TrainingSteps
from ....cluster.training.workers import Stand, Worker, Workers
from ....proto.errors import (
    BadInput,
    ClusterError,
    MoesaicError,
    StateLost,
    StepLost,
    describe_error,
)
from .coordination import ExpertSums, Learned, Restoring, TrunkSums, Where
from .decisions import agreed, expert_sums
from .driver import RunDriver, TrainingPool

log = logging.getLogger(__name__)

# How long a worker waits for the others, which live, and may have more to compute.
MEET_S = 3600.0

T = TypeVar("T")


class Coordinator:
    """A `Coordination`, in the process that decides."""

    def __init__(
        self,
        pool: TrainingPool,
        steps: TrainingSteps,
        *,
        workers: Workers | None = None,
        since: RunId | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with the first that enters; ``workers`` are none yet (None: one, in this process).

        With ``since`` it goes on with what this run began, in the place of a process that is gone.
        """
        self.steps = steps
        self.driver = RunDriver(
            pool, steps, progress=self._progress, beside=self._look, ended=self._tell_all
        )
        self._telling = RunTelling(steps)
        self._pool = pool
        self._since = since
        self._clock = clock
        self._workers = Workers(lease_s=math.inf) if workers is None else workers
        self._room: Future[None] | None = None
        self._waiting = ThreadPoolExecutor(1, thread_name_prefix="room")
        self._beginning = ThreadPoolExecutor(1, thread_name_prefix="begins")
        self._served = steps.versions
        self._placed: PlacementId | None = None
        # Guards what follows, and `_workers`. No thread waits for anything while it holds it.
        self._lock = threading.Lock()
        self._entered: Worker | None = None  # who puts the weights
        self._owned = False
        self._not_begun: BaseException | None = None  # why the run could not begin
        self._fresh = False  # hosts have begun an attempt that no worker has joined
        self._meetings: dict[str, Future[Any]] = {}
        self._next: Future[None] = Future()

    # ---- the beginning and the end --------------------------------------------------------------

    @property
    def plan(self) -> RunPlan:
        return self.steps.plan

    @property
    def is_over(self) -> bool:
        return self.driver.over is not None

    @property
    def is_broken(self) -> bool:
        return bool(self.steps.broken)

    @property
    def workers(self) -> int:
        """How many workers are known."""
        return len(self._workers)

    def planned_memory(self, *, lent: bool = False) -> dict[str, HostMemory]:
        with self.driver.lock:
            return self.steps.planned_memory(lent=lent)

    def enter(self, worker: Worker) -> Where | None:
        with self._lock:
            self._workers.enter(worker, self._clock())
            if self._entered is not None:
                return None
            self._entered = worker
        return self._open()

    def go_on(self) -> None:
        """Go on in the place of a process that is gone; workers come to it later."""
        self._entered = Worker("", 0)
        self._open()

    def _open(self) -> Where | None:
        self.driver.start()
        with self._opening(), self.driver.lock:
            if self._since is None:
                self.driver.exchange(self.steps.open())
                for host, memory in sorted(self.steps.planned_memory().items()):
                    log.info("run %d: %s is planned to need %s", self.plan.run, host, memory)
                return self._where()
            try:
                self.driver.exchange(self.steps.succeed(self._since))
                if self.steps.skipped is not None:
                    self._pool.now(skip=self.steps.skipped)
            except BaseException as error:
                # Hosts keep what they have for whoever tries next.
                why = f"run {self.plan.run} has not begun: {describe_error(error)}"
                self.driver.finish(ClusterError(why))
                raise
        self._may_begin()
        return None

    def own(self, worker: Worker) -> None:
        with self._opening(), self.driver.lock:
            self.driver.exchange(self.steps.own())
        self._may_begin()

    @contextmanager
    def _opening(self) -> Iterator[None]:
        """Let the others hear of an error, too."""
        try:
            yield
        except BaseException as error:
            with self._lock:
                self._not_begun = error
                self._end_waiting(error)
            raise

    def _may_begin(self) -> None:
        self._telling.began(self._clock())
        with self._lock:
            self._owned = self._fresh = self.driver.follows = True
        self._advance()

    def leave(self, worker: Worker) -> None:
        with self._lock:
            if not self._workers.leave(worker):
                return
            self._note_missing()
            self._note_gone([worker.name])
            last = not len(self._workers)
        if last:
            self.end()
        else:
            self._advance()

    def end(self) -> None:
        """End the run; hosts forget what they own for it, and keep the weights."""
        self.driver.stop()
        self._waiting.shutdown(cancel_futures=True)
        self._beginning.shutdown(cancel_futures=True)
        with self.driver.lock:
            self.driver.end()
        with self._lock:
            # An error has the frames of whoever caught it, and these may have the whole model.
            self._meetings = {}

    # ---- attempts -------------------------------------------------------------------------------

    def hear(self, worker: Worker) -> None:
        """Take note that a worker lives."""
        with self._lock:
            self._workers.hear(worker, self._clock())

    def again(self, worker: Worker) -> Stand:
        self.driver.check()
        with self._lock:
            if self._not_begun is not None:
                raise self._not_begun
            self._workers.wait(worker, self._clock())
            self._note_missing()
            begun = self._next
        self._advance()
        # That the run is broken is no error here: whoever comes is to bring a checkpoint.
        with suppress(StateLost):
            _result(begun, "the other workers to begin the next attempt")
        return self._stand(worker)

    def _stand(self, worker: Worker) -> Stand:
        steps = self.steps
        with self._lock:
            part, takes_part = self._workers.part, self._workers.takes_part(worker)
            silent = "" if takes_part else "workers are missing"
            return Stand(
                attempt=steps.attempt,
                step=steps.step,
                versions=steps.versions,
                placed=self._placed,
                lost=steps.broken or silent or steps.lost,
                broken=bool(steps.broken),
                members=frozenset(steps.members),
                trunk={
                    key: tuple(steps.having(key)) for key in self.plan.tensors if key.layer == TRUNK
                },
                number=part.index(worker.name) if takes_part else 0,
                workers=max(1, len(part)),
            )

    def _note_missing(self) -> None:
        """End the attempt if somebody is missing; the lock is held."""
        if why := self._workers.missing:
            self._end_meetings(self.steps.lose(why))

    def _end_meetings(self, error: Exception) -> None:
        for meeting in self._meetings.values():
            if not (meeting.running() or meeting.done()):
                meeting.set_exception(error)

    def _advance(self) -> None:
        """Begin the next attempt if all wait for it."""
        with self._lock:
            if not self._is_due:
                return
        with self.driver.lock:
            with self._lock:
                if not self._is_due:
                    return  # another thread has begun it meanwhile
            try:
                self._begin()
            except BaseException as error:
                with self._lock:
                    self._workers.fail()
                    self._end_waiting(error)
            else:
                self._let_begin()

    @property
    def _is_due(self) -> bool:
        return self._owned and self._workers.may_begin

    def _let_begin(self, *, stay: bool = False) -> None:
        """Let the workers that wait take part in the attempt that has begun.

        With ``stay`` those of the attempt before do, too, unless all of them are too few.
        """
        with self._lock:
            if stay:
                self._workers.stay()
                if not self._workers.has_enough:
                    self._workers.fail()
                    self._meetings = {}
                    return
            self._workers.begin()
            self._meetings = {}
            begun, self._next = self._next, Future()
            begun.set_result(None)

    def _end_waiting(self, error: BaseException) -> None:
        """Raise an error in all workers that wait for the next attempt; the lock is held."""
        self._next.set_exception(error)
        self._next = Future()

    def _begin(self) -> None:
        steps, fresh = self.steps, self._fresh
        steps.check()
        self._fresh, self._room = False, None
        if self._served != steps.versions:
            self._publish()
            self.driver.exchange(steps.begin())
        elif not fresh:
            self.driver.exchange(steps.again(self._pool.now()))

    def _publish(self) -> None:
        self._placed = self.driver.publish()
        self._served = self.steps.versions

    def _progress(self) -> RunProgress:
        with self._lock:
            workers = len(self._workers.part)
        return self._telling.progress(workers)

    def _look(self) -> None:
        """Look for workers that are gone, beside what the lease needs."""
        with self._lock:
            gone = self._workers.expire(self._clock())
            if not gone:
                return
            log.warning("run %d: %s: gone", self.plan.run, ", ".join(gone))
            self._note_missing()
            self._note_gone(gone)
        # In another thread: hosts may be slow to begin, and this one keeps the lease.
        self._beginning.submit(self._advance)

    def _note_gone(self, names: Sequence[str]) -> None:
        """Let the others hear of it if the one that gives the weights is gone; the lock is held."""
        first = self._entered
        if first is not None and first.name in names and not (self._owned or self._not_begun):
            self._not_begun = ClusterError(f"{first.name} is gone before it had begun")
            self._end_waiting(self._not_begun)

    def _tell_all(self, why: MoesaicError) -> None:
        """Let all that wait hear that the run is over."""
        with self._lock:
            self._end_meetings(why)
            self._end_waiting(why)

    # ---- meetings -------------------------------------------------------------------------------

    def _meet(
        self,
        worker: Worker,
        attempt: Attempt | None,
        where: str,
        brings: Any,
        act: Callable[[Mapping[str, Any]], T],
    ) -> T:
        """Wait until all workers have come; the last one lets ``act`` be done for all.

        None: whatever has become of the attempt.
        """
        self.driver.check()
        with self._lock:
            if attempt is not None:
                self._check(attempt)
            elif not self._workers.part or self._workers.missing:
                self._workers.gather(worker)
                self._meetings = {}
            if not self._workers.takes_part(worker):
                raise StepLost(f"{worker.name} takes part in no attempt: call zero_grad()")
            meeting = self._meetings.setdefault(where, Future())
            brought = self._workers.meet(worker, where, brings)
            acts = brought is not None and not (meeting.running() or meeting.done())
            if acts:
                meeting.set_running_or_notify_cancel()
        if acts:
            assert brought is not None
            try:
                with self.driver.lock:
                    if attempt is not None:
                        self._check(attempt)
                    meeting.set_result(act(brought))
            except BaseException as error:
                meeting.set_exception(error)
            if attempt is None:
                # It may be tried again; who is still waiting has its result.
                with self._lock:
                    self._workers.end_meeting(where)
                    self._meetings.pop(where, None)
        return _result(meeting, "the other workers")

    def _check(self, attempt: Attempt) -> None:
        if attempt != self.steps.attempt:
            raise StepLost(f"{attempt} is over")
        self.steps.check_attempt()

    def _act(self, act: Callable[[Mapping[str, Any]], T]) -> Callable[[Mapping[str, Any]], T]:
        """Let an error end the attempt, because gradients may be gone with it."""

        def acted(brought: Mapping[str, Any]) -> T:
            with self.driver.attempt():
                return act(brought)

        return acted

    def where(self, worker: Worker, attempt: Attempt | None = None) -> Where:
        with self.driver.lock:
            self.driver.check()
            if attempt is not None:
                self._check(attempt)
                self.steps.stay()
            return self._where()

    def _where(self) -> Where:
        steps = self.steps
        return Where(
            run=self.plan.run,
            versions=steps.versions,
            owning={key: tuple(steps.owning(key)) for key in self.plan.tensors},
            having={key: tuple(steps.having(key)) for key in self.plan.tensors},
        )

    def reduce_experts(
        self,
        worker: Worker,
        attempt: Attempt,
        learned: Learned,
        put: frozenset[ExpertKey],
    ) -> ExpertSums:
        every = {key.layer for key in self.plan.tensors if key.layer != TRUNK}

        def act(brought: Mapping[str, tuple[Learned, frozenset[ExpertKey]]]) -> ExpertSums:
            layers = frozenset[int]().union(*(learned.layers for learned, _ in brought.values()))
            given = {name: keys for name, (_, keys) in brought.items()}
            found = self.steps.reduce_experts(every - layers, put=given)
            sums = expert_sums(self.driver.exchange(found))
            self._telling.summed(sum(learned.tokens for learned, _ in brought.values()))
            self._room = self._waiting.submit(self.driver.await_room)
            return sums

        return self._meet(worker, attempt, "experts", (learned, put), self._act(act))

    def reduce_trunk(
        self, worker: Worker, attempt: Attempt, put: frozenset[ExpertKey], weight: float
    ) -> TrunkSums:
        def act(brought: Mapping[str, tuple[frozenset[ExpertKey], float]]) -> TrunkSums:
            sources: dict[ExpertKey, list[str]] = {}
            for name, (blocks, _) in brought.items():
                for key in blocks:
                    sources.setdefault(key, []).append(name)
            found = self.driver.exchange(self.steps.reduce_trunk(sources))
            return TrunkSums(
                squares={name: one for named in found.values() for name, one in named.items()},
                weight=math.fsum(weight for _, weight in brought.values()),
            )

        return self._meet(worker, attempt, "trunk", (put, weight), self._act(act))

    def commit(
        self, worker: Worker, attempt: Attempt, groups: Mapping[int, GroupUpdate] | None
    ) -> Stand:
        def act(brought: Mapping[str, Mapping[int, GroupUpdate] | None]) -> None:
            with self.driver.attempt():
                decided = agreed(brought)
                if self._room is not None:
                    self._room.result()
                self.driver.exchange(self.steps.commit(decided))
            self._telling.stepped(self._clock())
            self._go_on()

        self._meet(worker, attempt, "commit", groups, act)
        return self._stand(worker)

    def _go_on(self) -> None:
        """Begin the next attempt with all that take part in this one, and those that wait."""
        self._publish()
        self.driver.exchange(self.steps.begin())
        self._let_begin(stay=True)

    def total(
        self, worker: Worker, attempt: Attempt, name: str, numbers: Sequence[float]
    ) -> list[float]:
        def act(brought: Mapping[str, Sequence[float]]) -> list[float]:
            if len({len(numbers) for numbers in brought.values()}) > 1:
                raise BadInput(f"total {name!r}: the workers' numbers are not equally many")
            return [math.fsum(column) for column in zip(*brought.values(), strict=True)]

        return self._meet(worker, attempt, f"total {name}", tuple(numbers), self._act(act))

    # ---- checkpoints ----------------------------------------------------------------------------

    def forget(self, worker: Worker, checkpoint: str) -> Restoring:
        def act(brought: Mapping[str, str]) -> tuple[Where, list[str]]:
            if len(set(brought.values())) > 1:
                raise BadInput(
                    f"the workers have different checkpoints: {dict(brought)}; give all of them "
                    "the same one"
                )
            if (skipped := self.steps.skip()) is not None:
                # Hosts have room when it is gone.
                self._pool.now(skip=skipped)
                self.driver.await_room()
            self.driver.exchange(self.steps.forget(self._pool.now()))
            return self._where(), list(brought)

        where, names = self._meet(worker, None, "forget", checkpoint, act)
        return Restoring(where, names.index(worker.name), len(names))

    def take_over(self, worker: Worker, step: int) -> Stand:
        def act(_: Mapping[str, None]) -> None:
            self.driver.exchange(self.steps.take_over(step))
            self._go_on()

        self._meet(worker, None, "take over", None, act)
        return self._stand(worker)


def _result(future: Future[T], whom: str) -> T:
    try:
        return future.result(MEET_S)
    except NotInTime:
        if future.done():
            raise  # what was waited for has said so
        raise StepLost(f"{whom} did not come within {MEET_S:g} s") from None
