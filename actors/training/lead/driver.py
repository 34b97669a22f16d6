"""Carries out what `TrainingSteps` decides: sends the orders, and keeps the run's lease."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from typing import Protocol, TypeVar

from ....cluster.placement import PlacementId
from ....cluster.training.orders import Answers, Exchange, Order
from ....cluster.training.progress import RunProgress
from ....cluster.training.run_plan import PoolNow
from ....cluster.training.steps import TrainingSteps
from ....proto.errors import (
    BadInput,
    ClusterError,
    InternalError,
    MoesaicError,
    StateLost,
    StepLost,
    Superseded,
    describe_error,
)

log = logging.getLogger(__name__)

# How long a host may take to carry out an order.
ORDER_S = 120.0
# How long the pool may take to serve a committed version.
PUBLISH_S = 60.0
# How often the run tells the controller that it goes on, and looks at the pool's hosts.
LOOK_S = 1.0
_END_S = 10.0
_PAUSE_S = 0.01

T = TypeVar("T")


class TrainingPool(Protocol):
    """The pool as a run reaches it: its controller and its hosts. Any thread may call it."""

    def now(self, skip: int | None = None, tells: RunProgress | None = None) -> PoolNow:
        """Return the hosts, and renew the run's lease. Raises ClusterError if the run is over.

        ``skip`` is a version that some hosts have, and that is never to be served. ``tells`` is for
        those who look at the run.
        """
        ...

    def order(self, orders: Mapping[str, Order], timeout_s: float) -> Answers:
        """Send orders to hosts, all at once; one that does not answer in time gets NoAnswer."""
        ...

    def publish(self, version: int, timeout_s: float) -> PlacementId:
        """Let the pool serve a version that all hosts have; return a placement that names it.

        Raises ClusterError.
        """
        ...

    def end(self) -> None:
        """Tell the controller that the run has ended."""
        ...


class RunDriver:
    """The exchanges of one run, and the thread that keeps its lease.

    ``lock`` is held during each exchange, as the thread has some of its own.
    """

    def __init__(
        self,
        pool: TrainingPool,
        steps: TrainingSteps,
        *,
        progress: Callable[[], RunProgress],
        beside: Callable[[], None],
        ended: Callable[[MoesaicError], None],
    ) -> None:
        """``start`` starts the thread, and ``end`` ends it and the run.

        The thread calls ``beside`` again and again, and tells the pool of the ``progress``.
        ``ended`` is told why the run is over.
        """
        self.lock = threading.Lock()
        self.over: MoesaicError | None = None  # why the run takes no more orders
        self.pool = pool
        self.steps = steps
        self.follows = False  # whether owners follow hosts: they have begun
        self._progress = progress
        self._beside = beside
        self._ended = ended
        self._stop = threading.Event()
        self._publishing = ThreadPoolExecutor(1, thread_name_prefix="publishes")
        self._keeper = threading.Thread(target=self._keep, name="training-run", daemon=True)

    def start(self) -> None:
        self._keeper.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._keeper.is_alive():
            self._keeper.join(_END_S)
        self._publishing.shutdown(wait=False, cancel_futures=True)

    def end(self) -> None:
        """Let hosts and controller end the run, unless it is over."""
        if self.over is None:
            try:
                self.exchange(self.steps.close(), _END_S)
                self.pool.end()
            except MoesaicError as error:
                log.warning("run %d could not be ended: %s", self.steps.plan.run, error)
            self.finish(ClusterError("the training run was closed"))

    def finish(self, why: MoesaicError) -> None:
        """Take no more orders."""
        self.over = self.over or copy(why)
        self._ended(copy(why))

    def check(self) -> None:
        """Raise the error with which the run has ended."""
        if self.over is not None:
            raise copy(self.over)  # what is raised keeps the frames of whoever catches it

    def exchange(
        self,
        exchange: Exchange[T],
        timeout_s: float = ORDER_S,
        beside: Sequence[Future[None]] = (),
    ) -> T:
        """Carry out an exchange with hosts. Raises Superseded if a newer run has begun.

        ``beside`` goes on beside the first orders, and is awaited before the next.
        """
        answers: Answers | None = None
        with _cancelling(beside):
            while True:
                try:
                    orders = next(exchange) if answers is None else exchange.send(answers)
                except StopIteration as end:
                    return end.value
                answers = self.pool.order(orders, timeout_s) if orders else {}
                for answer in answers.values():
                    if isinstance(answer, Superseded):
                        self.finish(answer)
                        raise answer
                finish(beside)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Let any error end the attempt, because gradients may be gone with it."""
        try:
            yield
        except StepLost:
            raise
        except BaseException as error:
            lost = self.steps.lose(describe_error(error))
            ours = isinstance(error, MoesaicError) and not isinstance(error, BadInput | Superseded)
            if ours and not self.steps.broken:
                raise lost from error
            raise

    def _keep(self) -> None:
        """Renew the lease, and let owners follow hosts while no step does so."""
        while not self._stop.wait(LOOK_S):
            try:
                self._beside()
                self.look()
            except Superseded as error:
                self.finish(error)
                return
            except MoesaicError as error:
                log.warning("run %d: %s", self.steps.plan.run, describe_error(error))
            except Exception as error:
                log.exception("run %d: its lease is kept no more", self.steps.plan.run)
                self.finish(InternalError(f"the run's lease is not kept: {describe_error(error)}"))
                return

    def look(self) -> None:
        now = self.pool.now(tells=self._progress())
        if not self.lock.acquire(blocking=False):
            return
        try:
            steps = self.steps
            if self.follows and not (steps.owners_stay or steps.broken or self._stop.is_set()):
                for host, error in self.exchange(steps.follow(now)).items():
                    log.warning("run %d: %s: %s", steps.plan.run, host, error)
        finally:
            self.lock.release()

    def publish(self) -> PlacementId:
        """Let the pool serve the last version; return a placement that names it.

        Hosts that have come to serve an expert since the run looked at the pool get it from the
        expert's owners, meanwhile. Raises ClusterError.
        """
        steps = self.steps
        version = steps.versions.models[steps.plan.model]
        asked = self._publishing.submit(self.pool.publish, version, PUBLISH_S)
        while True:
            try:
                return asked.result(LOOK_S)
            except TimeoutError:
                if asked.done():
                    raise
            try:
                self.exchange(steps.renew(self.pool.now()))
            except (StateLost, Superseded):
                raise
            except MoesaicError as error:
                log.warning("run %d: %s", steps.plan.run, describe_error(error))

    def await_room(self) -> None:
        """Wait until hosts have no version before the served one: they hold two at a time."""
        until = time.monotonic() + PUBLISH_S
        while self.pool.now().old_versions and time.monotonic() < until:
            if self._stop.wait(_PAUSE_S):
                return


def finish(begun: Sequence[Future[None]]) -> None:
    """Wait for what goes on beside; raise the first error."""
    with _cancelling(begun):
        for one in begun:
            one.result()


@contextmanager
def _cancelling(begun: Iterable[Future[None]]) -> Iterator[None]:
    """After an error, cancel what has not begun yet: the next attempt would wait for it."""
    try:
        yield
    except BaseException:
        for one in begun:
            one.cancel()
        raise
