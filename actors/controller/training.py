"""The controller's methods for training runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping

from ...cluster.control.control import Control
from ...cluster.expert_keys import FIRST_VERSION, ExpertVersion
from ...cluster.placement import ModelRef, ModelShape, PlacementId
from ...cluster.planner.constraints import check_model
from ...cluster.reports.report import Balancedness
from ...cluster.reports.status import TrainingStatus
from ...cluster.training.runs import (
    RUN_LEASE_S,
    BegunTraining,
    LivingRun,
    NewsRequest,
    Publication,
    TrainingNews,
    TrainingRequest,
)
from ...proto.errors import ClusterError

# How long a model that was asleep may take to be placed again.
WAKE_S = 60.0
_LOOK_S = 0.2
# How long after its deadline a publication waits for the controller's loop.
_GRACE_S = 10.0


class Training:
    """Training runs for trainers. Errors are ClusterError, and Superseded for an older run."""

    def __init__(
        self,
        *,
        control: Control,
        models: Mapping[str, tuple[ModelRef, ModelShape]],
        store: Callable[[], None],
        evicting: Callable[[str], Collection[ExpertVersion]],
        hurry: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        """Set up the methods of one pool.

        ``store`` stores for later controllers what `Control.snapshot` returns, and raises
        ClusterError if one rules already. ``evicting`` returns what a host is evicting. ``hurry``
        lets the controller's loop tick at once.
        """
        self._control = control
        self._models = models
        self._store = store
        self._evicting = evicting
        self._hurry = hurry
        self._clock = clock
        self._unix_clock = unix_clock
        self._stored = control.training.snapshot()
        self._ticked = asyncio.Event()

    async def begin(self, asked: TrainingRequest) -> BegunTraining:
        """Begin to train a model; one that is asleep wakes up first.

        One of several workers joins those that have begun. Another process that succeeds goes on
        with the run that lives.
        """
        model = asked.model
        control = self._control
        try:
            check_model(control.models, model)
        except ValueError as error:
            raise ClusterError(str(error)) from error
        if not self._models[model][0].learns:
            raise ClusterError(
                f"model {model!r}: its experts cannot be trained; set models.{model}.train: true "
                "in the spec, and start the cluster again"
            )
        joined = control.training.join(asked)
        if joined is not None:
            self._keep()
            return self._begun(joined, since=None)
        if asked.succeed:
            followed = control.training.succeed(model, who=asked.who, now=self._clock())
            self._keep()
            return self._begun(followed, since=followed.since)
        asleep, until = model in control.idle_models.asleep, self._clock() + WAKE_S
        control.idle_models.wake(model, self._clock())
        while asleep and not control.publisher.has_published(model) and self._clock() < until:
            self._hurry()
            await asyncio.sleep(_LOOK_S)
            control.idle_models.wake(model, self._clock())
        layers = {} if control.placement is None else control.placement.layers
        begun = control.training.begin(
            model,
            layers,
            who=asked.who,
            unix_s=self._unix_clock(),
            now=self._clock(),
            workers=asked.workers,
        )
        try:
            # Before anybody learns its number: a later controller must not give it out again.
            self._keep()
        except BaseException:
            control.training.end(begun.run)
            raise
        return self._begun(begun, since=None)

    def _begun(self, run: LivingRun, since: int | None) -> BegunTraining:
        control = self._control
        return BegunTraining(
            run=run.run,
            first=run.first,
            since=since,
            versions=control.view.versions.only(run.model),
            next_version=run.next_version,
            redundancy=control.policy.balance.redundancy,
            lease_s=RUN_LEASE_S,
        )

    def news(self, asked: NewsRequest) -> TrainingNews:
        """Renew a run's lease, and return what it has to know of the pool."""
        control = self._control
        alive = control.training.renew(asked.run, self._clock(), asked.tells)
        if asked.skip is not None:
            control.training.skip(asked.run, asked.skip)
            self._keep()
        view = control.view
        entries = view.entries()
        # The view has forgotten what hosts are just evicting, but their memory has not.
        going = {
            one.version
            for host in entries
            for one in self._evicting(host)
            if one.key.model == alive.model
        }
        old = control.training.old_versions() | going
        if old:
            self._hurry()  # routers may have acknowledged the next one by now
        placement = control.placement
        if placement is not None and placement.id == asked.knows:
            placement = None
        layers = {} if placement is None else placement.layers
        return TrainingNews(
            placed=None if placement is None else placement.id,
            layers={key: layer for key, layer in layers.items() if key.model == alive.model},
            entries=entries,
            domains={host: view.hosts[host].domain or host for host in entries},
            leaving=control.leaving & entries.keys(),
            versions=view.versions.only(alive.model),
            old_versions=old,
        )

    async def publish(self, run: int, version: int, timeout_s: float) -> PlacementId:
        """Serve a run's next version when the replicas of its model have it.

        If some do not get it within ``timeout_s``, those that have it take over their load. Return
        a placement that names it.
        """
        now = self._clock()
        asked = self._control.training.publish(run, version, until=now + timeout_s, now=now)
        while not self._is_over(asked) and self._clock() < asked.until + _GRACE_S:
            self._hurry()
            try:
                await asyncio.wait_for(self._ticked.wait(), _LOOK_S)
            except TimeoutError:
                continue  # a tick takes long while a host does not answer
        placement = self._control.placement
        if self._is_over(asked) and not asked.error and placement is not None:
            return placement.id
        raise ClusterError(
            asked.error or f"version {version}: the controller's loop stands still; see `status`"
        )

    def end(self, run: int) -> None:
        """End a run; hosts forget what they have for it."""
        self._control.training.end(run)
        self._keep()
        self._hurry()

    def ticked(self) -> None:
        """Store what a tick has changed, before anybody hears of it, and wake who waits for it.

        Raises ClusterError if a newer controller rules.
        """
        self._keep()
        self._ticked.set()
        self._ticked = asyncio.Event()

    def status(self, balancedness: Mapping[str, Balancedness]) -> TrainingStatus | None:
        """Return what `status` shows of the run that lives; ``balancedness`` is that of models."""
        alive, seen = self._control.training.alive, self._control.view.observations
        if alive is None:
            return None
        told = self._control.training.told
        owned = {} if told.parts is None else told.parts.owned
        return TrainingStatus(
            run=alive.run,
            model=alive.model,
            initiator=alive.who,
            age_s=round(max(0.0, self._unix_clock() - alive.began_at), 1),
            version=self._control.view.versions.models.get(alive.model, FIRST_VERSION),
            steps=alive.steps,
            attempt=told.attempt,
            workers=told.workers,
            unprotected_tensors=told.unprotected,
            owned_tensors={host: one.owned for host, one in sorted(seen.items()) if one.owned},
            owned_bytes={host: one.nbytes for host, one in owned.items()},
            step_s=None if told.step_s is None else round(told.step_s, 3),
            tokens_per_s=None if told.tokens_per_s is None else round(told.tokens_per_s, 1),
            balancedness=balancedness.get(alive.model),
        )

    def _is_over(self, asked: Publication) -> bool:
        """Return whether a placement names the version, or none will."""
        placement = self._control.placement
        if asked.under_way or placement is None:
            return False
        return (
            bool(asked.error)
            or placement.versions.models.get(asked.model, FIRST_VERSION) >= asked.version
        )

    def _keep(self) -> None:
        now = self._control.training.snapshot()
        if now != self._stored:
            self._store()
            self._stored = now
