"""A run of several workers: an actor decides for them, and is restarted if it is gone."""

from __future__ import annotations

import getpass
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ....cluster.expert_keys import ExpertKey
from ....cluster.training.contributions import Attempt
from ....cluster.training.host_memory import HostMemory
from ....cluster.training.orders import GroupUpdate
from ....cluster.training.run_plan import RunPlan
from ....cluster.training.runs import BegunTraining, TrainingRequest
from ....cluster.training.steps import TrainingSteps
from ....cluster.training.workers import Stand, Worker, Workers
from ....proto.errors import (
    BadInput,
    ClusterError,
    InternalError,
    MoesaicError,
    NoAnswer,
    StepLost,
    Superseded,
    describe_error,
)
from ...runtime.log_settings import log_runtime_env
from ...runtime.process_log import begin_process
from ...runtime.ray_border import cluster_of, controller_of, last_line, ray_get
from ...store.durable_state import stored_deployment
from .coordination import ExpertSums, Learned, Restoring, TrunkSums, Where
from .coordinator import MEET_S, Coordinator
from .ray_pool import RayTrainingPool

log = logging.getLogger(__name__)

# How long a model that was asleep may take to be placed again.
BEGIN_S = 90.0
# How long an actor that is gone may take to be there again.
BACK_S = 60.0
# How long a run waits for workers when all are gone.
IDLE_S = 30.0
# How long a call may take that waits for other workers.
LONG_S = MEET_S + 60.0
_BEAT_S = 1.0
_ASK_S = 30.0
_PAUSE_S = 0.2


class RayTrainingRun:
    """The actor of a run: it has the `Coordinator`, and ends after the last worker."""

    def __init__(self, namespace: str, begun: BegunTraining, plan: RunPlan, workers: int) -> None:
        """Begin the run, or go on with it if this actor was restarted. Raises ClusterError."""
        name = run_name(begun)
        begin_process("run", name, cluster_of(namespace))
        again = ray.get_runtime_context().was_current_actor_reconstructed
        if again:
            asked = TrainingRequest(plan.model, getpass.getuser(), succeed=True)
            begun = begin_run(namespace, asked)
            plan = replace(plan, run=begun.run)
        self._digest = plan.digest
        pool = RayTrainingPool(namespace, begun.run, plan.model)
        versions, number = begun.versions, begun.next_version
        steps = TrainingSteps(plan, pool.now(), versions=versions, next_version=number)
        self._coordinator = Coordinator(pool, steps, workers=Workers(workers), since=begun.since)
        if again:
            self._coordinator.go_on()
        self._this = ray.get_runtime_context().current_actor
        threading.Thread(target=self._await_end, name="run-end", daemon=True).start()

    def call(self, what: str, *given: Any, **named: Any) -> Any:
        """Call a method of `Coordination`, or read a property."""
        if what == "enter":
            return self._enter(*given)
        found = getattr(self._coordinator, what)
        return found(*given, **named) if callable(found) else found

    def _enter(self, worker: Worker, digest: str) -> Where | None:
        if digest != self._digest:
            raise BadInput(
                f"{worker.name}: the workers of a run train the same parameters, in the same "
                "groups, with the same optimizer and settings; give all of them the same arguments"
            )
        return self._coordinator.enter(worker)

    def pid(self) -> int:
        return os.getpid()

    def _await_end(self) -> None:
        """End this actor when the run is over, or has had no workers for `IDLE_S`."""
        idle_since = time.monotonic()
        while not self._coordinator.is_over:
            time.sleep(_BEAT_S)
            now = time.monotonic()
            if self._coordinator.workers:
                idle_since = now
            elif now - idle_since >= IDLE_S:
                log.warning("the run has had no workers for %g s, and ends", IDLE_S)
                self._coordinator.end()
        time.sleep(_BEAT_S)  # whoever waits for an answer gets it
        ray.kill(self._this, no_restart=True)


def run_name(begun: BegunTraining) -> str:
    return f"run-{begun.first}"


def begin_run(namespace: str, asked: TrainingRequest) -> BegunTraining:
    """Ask the controller for a run. Raises ClusterError."""
    begun = controller_of(namespace).begin_training.remote(asked)
    return ray_get(begun, BEGIN_S, f"beginning to train {asked.model}")


def start_run_actor(namespace: str, begun: BegunTraining, plan: RunPlan, workers: int) -> None:
    """Start the run's actor on this node, unless another worker has started it."""
    deployment = stored_deployment(namespace)
    (
        ray.remote(RayTrainingRun)
        .options(
            name=run_name(begun),
            namespace=namespace,
            get_if_exists=True,
            lifetime="detached",
            max_restarts=-1,
            # Each worker waits in one call, and says in another one that it lives.
            max_concurrency=3 * workers + 8,
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(
                ray.get_runtime_context().get_node_id(), soft=True
            ),
            **log_runtime_env(deployment.log_environment if deployment else None),
        )
        .remote(namespace, begun, plan, workers)
    )


class _Unreachable(Exception):
    """The actor is gone, or being restarted."""


class RemoteCoordinator:
    """A `Coordination` in an actor.

    If that is restarted, the step under way is lost, unless it was committed already.
    """

    def __init__(self, namespace: str, name: str, plan: RunPlan) -> None:
        self.plan = plan
        self._namespace = namespace
        self._name = name
        self._step = 0
        self._over: MoesaicError | None = None
        self._stop = threading.Event()
        self._beats: threading.Thread | None = None

    @property
    def is_over(self) -> bool:
        return self._over is not None

    @property
    def is_broken(self) -> bool:
        return self._when_back("is_broken")

    def planned_memory(self, *, lent: bool = False) -> dict[str, HostMemory]:
        return self._call("planned_memory", lent=lent)

    def enter(self, worker: Worker) -> Where | None:
        # Before: it is known from the beginning of the call on.
        self._beats = threading.Thread(
            target=self._beat, args=(worker,), name="training-worker", daemon=True
        )
        self._beats.start()
        return self._when_back("enter", worker, self.plan.digest)

    def own(self, worker: Worker) -> None:
        self._call("own", worker)

    def again(self, worker: Worker) -> Stand:
        return self._at(self._when_back("again", worker))

    def where(self, worker: Worker, attempt: Attempt | None = None) -> Where:
        return self._when_back("where", worker, attempt)

    def reduce_experts(
        self,
        worker: Worker,
        attempt: Attempt,
        learned: Learned,
        put: frozenset[ExpertKey],
    ) -> ExpertSums:
        return self._meet("reduce_experts", worker, attempt, learned, put)

    def reduce_trunk(
        self, worker: Worker, attempt: Attempt, put: frozenset[ExpertKey], weight: float
    ) -> TrunkSums:
        return self._meet("reduce_trunk", worker, attempt, put, weight)

    def commit(
        self, worker: Worker, attempt: Attempt, groups: Mapping[int, GroupUpdate] | None
    ) -> Stand:
        before = self._step
        try:
            return self._at(self._ask("commit", worker, attempt, groups))
        except _Unreachable as error:
            # It may have been decided.
            stand = self.again(worker)
            if stand.step > before:
                return stand
            raise StepLost(f"{attempt} is lost: {error}") from error

    def total(
        self, worker: Worker, attempt: Attempt, name: str, numbers: Sequence[float]
    ) -> list[float]:
        return self._meet("total", worker, attempt, name, numbers)

    def forget(self, worker: Worker, checkpoint: str) -> Restoring:
        return self._to_be_restored("forget", worker, checkpoint)

    def take_over(self, worker: Worker, step: int) -> Stand:
        return self._at(self._to_be_restored("take_over", worker, step))

    def leave(self, worker: Worker) -> None:
        self._stop.set()
        try:
            self._call("leave", worker, timeout_s=_ASK_S)
        except MoesaicError as error:
            log.warning("%s: %s could not leave it: %s", self._name, worker.name, error)
        if self._beats is not None:
            self._beats.join(_ASK_S)
        self._over = self._over or ClusterError("this worker has left the training run")

    # ---- calls ----------------------------------------------------------------------------------

    def _at(self, stand: Stand) -> Stand:
        self._step = stand.step
        return stand

    def _meet(self, what: str, worker: Worker, attempt: Attempt, *given: Any) -> Any:
        try:
            return self._ask(what, worker, attempt, *given)
        except _Unreachable as error:
            raise StepLost(f"{attempt} is lost: {error}") from error

    def _to_be_restored(self, what: str, worker: Worker, given: Any) -> Any:
        try:
            return self._ask(what, worker, given)
        except _Unreachable as error:
            raise StepLost(f"the checkpoint is not taken over: {error}") from error

    def _when_back(self, what: str, *given: Any) -> Any:
        """Ask as soon as the actor is there, which may be restarted."""
        until = time.monotonic() + BACK_S
        while True:
            try:
                return self._ask(what, *given)
            except _Unreachable as error:
                if time.monotonic() >= until:
                    raise ClusterError(str(error)) from error
            time.sleep(_PAUSE_S)

    def _call(self, what: str, *given: Any, timeout_s: float = LONG_S, **named: Any) -> Any:
        try:
            return self._ask(what, *given, timeout_s=timeout_s, **named)
        except _Unreachable as error:
            raise ClusterError(str(error)) from error

    def _ask(self, what: str, *given: Any, timeout_s: float = LONG_S, **named: Any) -> Any:
        """Call a method of the actor's coordinator. Raises _Unreachable."""
        try:
            # Not kept: a handle of an actor that was ended for good answers no more.
            actor: Any = ray.get_actor(self._name, namespace=self._namespace)
        except ValueError as error:
            self._over = self._over or ClusterError(f"{self._name} has ended: {error}")
            raise self._over from error
        try:
            return ray.get(actor.call.remote(what, *given, **named), timeout=timeout_s)
        except GetTimeoutError:
            raise NoAnswer(f"{self._name} has not answered within {timeout_s:g} s") from None
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, MoesaicError):
                if isinstance(cause, Superseded):
                    self._over = cause
                raise cause from None
            raise InternalError(f"{self._name}: {describe_error(cause)}") from error
        except RayActorError as error:
            raise _Unreachable(f"{self._name}: {last_line(error)}") from error
        except RayError as error:
            raise ClusterError(f"{self._name}: {last_line(error)}") from error

    def _beat(self, worker: Worker) -> None:
        """Tell the actor again and again that this worker lives; end it if it is frozen."""
        while not self._stop.wait(_BEAT_S):
            try:
                self._call("hear", worker, timeout_s=_ASK_S)
            except Superseded:
                return
            except NoAnswer as error:
                log.warning("%s, and is restarted", error)
                self._restart()
            except MoesaicError as error:
                log.warning("%s: %s", self._name, describe_error(error))

    def _restart(self) -> None:
        """Let Ray restart the actor, which takes its process from it even if that is stopped."""
        try:
            ray.kill(ray.get_actor(self._name, namespace=self._namespace), no_restart=False)
        except (ValueError, RayError) as error:
            log.warning("%s: it could not be restarted: %s", self._name, error)
