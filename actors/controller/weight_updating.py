"""The controller's methods for updates of experts' weights."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from ...cluster.control.control import Control
from ...cluster.expert_keys import ExpertKey, ExpertVersion
from ...cluster.placement import HostEntry, ModelRef, ModelShape, PlacementId
from ...cluster.planner.constraints import check_expert, check_model
from ...cluster.reports.report import PlacementNumber
from ...cluster.reports.updates import WeightUpdateReport
from ...cluster.update_folder import UpdateFolder
from ...cluster.weight_updates import WeightUpdate
from ...proto.errors import ClusterError
from ..host.weight_grants import BegunUpdate, Granted, LocatedExpert, grant_all
from ..store.cluster_secret import secret_of
from ..store.durable_state import store_updates
from .host_actors import HostActors

log = logging.getLogger(__name__)

# How often the controller checks whether the weights of an update have arrived.
_LOOK_S = 0.1
# An update lives longer than its callers wait, so that it can be served at their deadline.
_GRACE_S = 10.0
# How long a host may take to learn of a model; it reads the configuration, and no weights.
_INTRODUCE_S = 10.0
# More than the header of a safetensors file with four tensors.
_HEADER_BYTES = 4096
# How long a caller waits for the record of an update in its model's folder.
_RECORD_S = 30.0


class WeightUpdating:
    """Updates for the SDK and for trainers. Errors are ClusterError."""

    def __init__(
        self,
        *,
        control: Control,
        hosts: HostActors,
        models: Mapping[str, tuple[ModelRef, ModelShape]],
        namespace: str,
        term: int,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set up the methods of one pool; ``wake`` lets the controller's loop tick soon."""
        self._control = control
        self._hosts = hosts
        self._models = models
        self._namespace = namespace
        self._term = term
        self._wake = wake
        self._clock = clock
        self._begun: dict[tuple[str, int], WeightUpdate] = {}
        self._serving: set[asyncio.Task[None]] = set()

    async def begin(self, experts: Sequence[ExpertKey], who: str, timeout_s: float) -> BegunUpdate:
        """Begin an update of experts of one model.

        It ends without effect if `serve` is not called within ``timeout_s``.
        """
        models = {key.model for key in experts}
        if len(models) != 1:
            raise ClusterError(
                f"experts: an update changes experts of one model, not {len(models)}"
            )
        (model,) = models
        try:
            for key in experts:
                check_expert(self._control.models, key)
            self._control.idle_models.wake(model, self._clock())
            update = self._control.updates.begin(
                model, experts, who=who, until=self._clock() + timeout_s + _GRACE_S
            )
        except ValueError as error:
            raise ClusterError(str(error)) from error
        self._keep(update)
        return BegunUpdate(
            number=update.number,
            granted=await self._grants(update.weights),
            folder=self._models[model][0].updates,
        )

    async def grant(self, model: str, number: int) -> list[Granted]:
        """Return the hosts that take weights of an update by now."""
        return await self._grants(self._begun_by_this(model, number).weights)

    async def serve(self, model: str, number: int, timeout_s: float) -> WeightUpdateReport:
        """Serve an update when all hosts that need it have it.

        If some host does not get it within ``timeout_s``, those that have it take over its load.
        The weights must be in the model's `updates` folder by now, if it has one.
        """
        update = self._begun_by_this(model, number)
        del self._begun[model, number]
        return await self._serve(update, timeout_s)

    def abandon(self, model: str, number: int) -> None:
        """Give an update up."""
        update = self._begun.pop((model, number), None)
        if update is not None:
            self._control.updates.abandon(update)

    async def revert(self, model: str, who: str, timeout_s: float) -> WeightUpdateReport:
        """Serve the versions from before the last update of a model again."""
        try:
            check_model(self._control.models, model)
            self._control.idle_models.wake(model, self._clock())
            update = self._control.updates.begin_revert(
                model, who=who, until=self._clock() + timeout_s + _GRACE_S
            )
        except ValueError as error:
            raise ClusterError(str(error)) from error
        # Before the first plan, some host may not have reported yet.
        lost = self._control.weights.lost(update.weights) if self._control.settled else []
        if lost:
            self._control.updates.abandon(update)
            raise ClusterError(
                f"update {update.reverts} of {model} cannot be taken back: {lost[0]} is in no file "
                f"and on no host any more ({len(lost)} in all); put the weights again instead"
            )
        self._keep(update)
        del self._begun[model, update.number]
        return await self._serve(update, timeout_s)

    def locate(self, key: ExpertKey) -> LocatedExpert:
        """Return the version of an expert that is served, and the hosts that hold it.

        If its model is asleep, it wakes, because somebody is about to read the expert.
        """
        try:
            check_expert(self._control.models, key)
        except ValueError as error:
            raise ClusterError(str(error)) from error
        self._control.idle_models.wake(key.model, self._clock())
        view = self._control.view
        seen = view.observations
        ref, shape = self._models[key.model]
        return LocatedExpert(
            weights=view.versions.served(key),
            holders=[seen[host].entry for host in view.holders(key)],
            ref=ref,
            most_bytes=shape.expert_bytes + _HEADER_BYTES,
        )

    def store(self) -> None:
        """Store for later controllers what is served, and which numbers were given out.

        Raises ClusterError if a newer controller rules.
        """
        if not store_updates(self._namespace, self._term, self._control.snapshot()):
            raise ClusterError(
                f"a newer controller rules than that of term {self._term}; it may not know of the "
                "new weights, so look at `status` and try again"
            )

    def _begun_by_this(self, model: str, number: int) -> WeightUpdate:
        update = self._begun.get((model, number))
        if update is None:
            raise ClusterError(
                f"update {number} of {model}: this controller did not begin it; begin it again"
            )
        return update

    async def _serve(self, update: WeightUpdate, timeout_s: float) -> WeightUpdateReport:
        updates, until = self._control.updates, self._clock() + timeout_s
        if not updates.is_under_way(update):
            raise ClusterError(
                f"update {update.number} of {update.model} took too long, and was abandoned; "
                "begin it again"
            )
        self._wake()
        while not updates.is_ready(update) and self._clock() < until:
            await asyncio.sleep(_LOOK_S)
        missing = updates.missing(update)
        try:
            if missing:
                raise ClusterError(
                    f"update {update.number} of {update.model}: no host has {missing[0]} after "
                    f"{timeout_s:g} s, so nothing was changed ({len(missing)} in all)"
                )
            updates.hold(update)
        except (ClusterError, ValueError) as error:
            await self._give_up(update)
            raise ClusterError(str(error)) from error
        # It goes on when its caller does not wait any more: its record may be written already.
        task = asyncio.get_running_loop().create_task(self._record_and_serve(update))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        try:
            await asyncio.wait_for(asyncio.shield(task), _RECORD_S)
        except TimeoutError:
            raise ClusterError(
                f"update {update.number} of {update.model}: writing to {self._folder_of(update)} "
                f"takes more than {_RECORD_S:g} s; the update is served when that ends"
            ) from None
        placed = await self._published(update.versions)
        shape = self._control.models[update.model]
        return WeightUpdateReport(
            model=update.model,
            number=update.number,
            experts=len(update.versions),
            initiator=update.who,
            reverts=update.reverts,
            volatile=bool(set(update.weights) & set(self._control.weights.volatile(shape))),
            placement=PlacementNumber(term=placed.term, epoch=placed.epoch),
        )

    async def _record_and_serve(self, update: WeightUpdate) -> None:
        updates, folder = self._control.updates, self._folder_of(update)
        try:
            if folder is not None:
                follows = updates.last_number(update.model)
                await asyncio.to_thread(folder.record, update, follows=follows)
            updates.serve(update, in_file=folder is not None)
        except BaseException as error:
            await self._give_up(update)
            if isinstance(error, ValueError):
                raise ClusterError(str(error)) from error
            raise
        self.store()
        log.info(
            "update %d of %s is served: %d experts",
            update.number,
            update.model,
            len(update.versions),
            extra={"model": update.model, "initiator": update.who},
        )

    async def _give_up(self, update: WeightUpdate) -> None:
        """Abandon an update, and delete its weights from the model's folder."""
        self._control.updates.abandon(update)
        folder = self._folder_of(update)
        if folder is not None:
            try:
                await asyncio.to_thread(folder.remove_weights, update.number)
            except OSError as error:
                log.warning("update %d of %s: %s", update.number, update.model, error)

    def _folder_of(self, update: WeightUpdate) -> UpdateFolder | None:
        ref, _ = self._models[update.model]
        return None if ref.updates is None else UpdateFolder(ref.updates, ref.name)

    async def _published(self, versions: Mapping[ExpertKey, int]) -> PlacementId:
        """Wait for the placement that names ``versions``, which the next tick publishes."""
        until = self._clock() + _GRACE_S
        self._wake()
        while True:
            placement = self._control.placement
            if placement is not None and all(
                placement.versions.of(key) == version for key, version in versions.items()
            ):
                return placement.id
            if self._clock() >= until:
                raise ClusterError("the controller has not published the update yet; see `status`")
            await asyncio.sleep(_LOOK_S)

    def _keep(self, update: WeightUpdate) -> None:
        # Before anybody learns the number: a later controller must not give it out again.
        self.store()
        self._begun[update.model, update.number] = update

    async def _grants(self, weights: Sequence[ExpertVersion]) -> list[Granted]:
        """Grant weights of one model to the hosts that hold its experts.

        If an expert was lost with its last host, the hosts that are to hold it take its place.
        """
        view = self._control.view
        ref, shape = self._models[weights[0].key.model]
        lost = {one.key for one in weights if not view.holders(one.key)}
        if ref.path is None:
            lost.clear()  # only holders have what the experts of an attached model share
        found: list[tuple[HostEntry, list[ExpertVersion]]] = []
        for host, seen in view.observations.items():
            wanted = lost.intersection(self._control.wanted(host)) if lost else lost
            mine = [
                one
                for one in weights
                if (view.holds(host, one.key) or one.key in wanted) and seen.has_room(one.key)
            ]
            if mine:
                found.append((seen.entry, mine))
        granted, secret = [], secret_of(self._namespace)
        for entry, mine in found:
            try:
                await self._hosts.introduce(entry.host, ref, shape, _INTRODUCE_S)
            except ClusterError as error:
                log.warning("%s", error, extra={"model": ref.name, "host": entry.host})
            else:
                granted.append(grant_all(secret, entry, mine, self._term))
        return granted
