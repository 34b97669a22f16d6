"""Starts the workers of `moesaic train`, and others in the places of those that are gone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from ....proto.errors import ClusterError, InternalError, MoesaicError, describe_error
from ...runtime.log_settings import log_runtime_env
from ...runtime.ray_border import last_line, ray_get
from ...store.durable_state import stored_deployment
from .worker import RayTrainWorker, Work

log = logging.getLogger(__name__)

# How long Ray may take to start a worker.
START_S = 180.0
# How many workers may be lost before the run makes another step.
MOST_LOSSES = 5
# How often a worker is asked whether it lives, and how long it may take to say so.
_ASK_EVERY_S, FROZEN_S = 5.0, 60.0
# Methods of a worker that run at once: `run`, and those that come meanwhile.
_CALLS = 4


class WorkerCrew:
    """The workers of one run. They end with the process that has started them."""

    def __init__(self, work: Work, *, told: Callable[[str], None]) -> None:
        """Start all; ``told`` gets a line for each that is replaced. Raises ClusterError."""
        self._work = work
        self._told = told
        self._workers: dict[int, Any] = {}
        self._runs: dict[Any, int] = {}  # number of the worker by the future of its `run`
        self._asked: dict[int, tuple[float, Any]] = {}  # since when a worker is to answer, and what
        self._losses = 0
        self._step = -1
        self._stops = False  # all are told to
        self._ends = False  # one has ended, so the run has
        try:
            for number in range(work.spec.workers.count):
                self._start(number, again=False)
            for number in range(work.spec.workers.count):
                self._await(number)
        except BaseException:
            self.close()
            raise

    def _start(self, number: int, *, again: bool) -> None:
        deployment = stored_deployment(self._work.namespace)
        self._workers[number] = (
            ray.remote(RayTrainWorker)
            .options(
                namespace=self._work.namespace,
                num_cpus=self._work.spec.workers.num_cpus,
                max_concurrency=_CALLS,
                scheduling_strategy="SPREAD",
                **log_runtime_env(deployment.log_environment if deployment else None),
            )
            .remote(self._work, number, again=again)
        )
        self._runs[self._workers[number].run.remote()] = number
        if self._stops:
            self._workers[number].stop.remote()

    def _await(self, number: int) -> None:
        cpus = self._work.spec.workers.num_cpus
        what = f"starting worker {number}, for which Ray reserves {cpus:g} CPUs (workers.num_cpus)"
        ray_get(self._workers[number].pid.remote(), START_S, what)

    def look(self, step: int, timeout_s: float) -> bool:
        """Wait a little, and replace workers that are gone; return whether all have ended.

        ``step`` is the last one that was recorded. Raises the error with which a worker has ended,
        and ClusterError if too many are lost.
        """
        if step != self._step:
            self._step, self._losses = step, 0
        self._end_frozen(time.monotonic())
        ended, _ = ray.wait(list(self._runs), num_returns=1, timeout=timeout_s)
        for one in ended:
            number = self._runs.pop(one)
            try:
                ray.get(one)
                self._ends = True
            except RayActorError as error:
                self._replace(number, last_line(error))
            except RayTaskError as error:
                if isinstance(error.cause, MoesaicError):
                    raise error.cause from None
                raise InternalError(f"worker {number}: {describe_error(error.cause)}") from error
        return not self._runs

    def _end_frozen(self, now: float) -> None:
        """End workers that do not answer, as if they were gone: the others wait for them."""
        for number in self._runs.values():
            worker = self._workers[number]
            since, asked = self._asked.get(number, (now - _ASK_EVERY_S, None))
            answered = asked is None or bool(ray.wait([asked], timeout=0)[0])
            if answered and now - since >= _ASK_EVERY_S:
                self._asked[number] = now, worker.pid.remote()
            elif not answered and now - since >= FROZEN_S:
                self._told(f"worker {number} has not answered for {FROZEN_S:g} s, and is ended")
                self._asked.pop(number)
                ray.kill(worker)

    def _replace(self, number: int, why: str) -> None:
        if self._ends:
            log.warning("worker %d is gone after the end of the run: %s", number, why)
            return
        self._losses += 1
        if self._losses > MOST_LOSSES:
            raise ClusterError(
                f"{self._losses} workers were lost after step {self._step}; the last one: worker "
                f"{number}: {why}. `moesaic logs worker` has what they said"
            )
        self._asked.pop(number, None)
        # Ray goes on with what may have been the reason.
        said = why.partition(". ")[0]
        self._told(f"worker {number} is gone ({said}); another one takes its place")
        self._start(number, again=True)

    def stop(self) -> None:
        """Let all workers end after the step under way."""
        self._stops = True
        for worker in self._workers.values():
            worker.stop.remote()

    def pids(self) -> dict[int, int]:
        """Return the process of each worker. Raises ClusterError."""
        return {
            number: ray_get(worker.pid.remote(), START_S, f"asking worker {number}")
            for number, worker in self._workers.items()
        }

    def close(self) -> None:
        """End all workers at once."""
        for worker in self._workers.values():
            ray.kill(worker)
        self._runs.clear()
