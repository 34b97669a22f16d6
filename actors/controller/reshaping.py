"""The controller's part in `moesaic apply`: the running cluster follows another deployment."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import replace

from ray.exceptions import RayError

from ...cluster.control.control import Control
from ...cluster.control.reshaping import change_model, check_leaves, follow, remove_model
from ...cluster.expert_keys import LayerKey
from ...cluster.placement import ModelRef, ModelShape
from ...cluster.planner.capacity import capacity_shortage
from ...cluster.spec.deployment import DeployedModel, Deployment
from ...proto.errors import ClusterError, MoesaicError
from ..host.report import HostReport
from ..store.durable_state import store_deployment
from .sizing import Sizing

log = logging.getLogger(__name__)

STORE_S = 10.0
# For the trunks of a model to end, beside the time for their requests.
LEAVE_S = 120.0

Holdings = Mapping[LayerKey, Mapping[int, tuple[int, ...]]]


class Reshaping:
    """What the cluster is to be, and the changes to it, one at a time."""

    def __init__(
        self,
        *,
        deployment: Deployment,
        control: Control,
        sizing: Sizing,
        models: MutableMapping[str, tuple[ModelRef, ModelShape]],
        reports: Mapping[str, HostReport],
        adopt: Callable[[ModelRef, ModelShape], None],
        forget: Callable[[str, ModelRef], None],
        left: Callable[[], object] = lambda: None,
        namespace: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with what is stored; ``adopt`` serves a model, ``forget`` orders a host to.

        ``left`` is called when a model has left, to store what a later controller must know.
        """
        self.deployment = deployment
        self._control = control
        self._sizing = sizing
        self._models = models
        self._reports = reports
        self._adopt = adopt
        self._forget = forget
        self._left = left
        self._namespace = namespace
        self._clock = clock
        self._alone = asyncio.Lock()
        self._changing: asyncio.Task[None] | None = None
        # Models that are no more in the deployment, and until when their trunks may end.
        self._leaving: dict[str, float] = {}

    async def follow(
        self, before: str, wanted: Deployment, who: str, then: Deployment | None = None
    ) -> None:
        """Let the cluster be as ``wanted`` from now on, if it is as ``before`` (JSON) still.

        ``then`` is what it is to be in the end, if this is a step on the way. Everything is checked
        first, and stored before anything changes: a later controller goes on from there. A model
        that is replaced has to leave first. Raises ClusterError.
        """
        async with self._alone:
            await self._settled()
            if not Deployment.from_json(before).is_like(self.deployment):
                raise ClusterError(
                    "somebody else has changed the cluster meanwhile; look at the difference again"
                )
            known = {one.ref.name: one for one in self.deployment.models}
            asked = {one.ref.name: one for one in wanted.models}
            gone = [name for name in known if name not in asked]
            fresh = [one for name, one in asked.items() if name not in known]
            stays = [one for name, one in asked.items() if name in known]
            try:
                self._check(gone, fresh, stays)
                self._check_room(then or wanted)
            except ValueError as error:
                raise ClusterError(str(error)) from error
            used = self._sizing.used_groups | set(wanted.order)
            groups = {n: group for n, group in wanted.groups.items() if n in used}
            wanted = replace(wanted, groups=groups)
            changing = self._store_and_change(wanted, gone, fresh, stays, who)
            self._changing = asyncio.get_running_loop().create_task(changing)
            await self._settled()
            log.info("the cluster follows another spec", extra={"who": who})

    def own_holdings(self, host: str, report: HostReport) -> Holdings:
        """Return the experts that a host holds of what the cluster serves, or just served.

        The host forgets a model that has become another one at once, and one that has left when it
        has evicted its experts.
        """
        strange = [ref for ref, _ in report.models if self._is_strange(ref)]
        others = {ref.name for ref in strange if ref.name in self._models}
        held = {key.model for key, experts in report.holdings.items() if experts}
        # Also a model that left under the controller before this one.
        self._control.removed |= {ref.name for ref in strange if ref.name not in self._models}
        for ref in strange:
            if ref.name in others or ref.name not in held:
                self._forget(host, ref)
        return {key: one for key, one in report.holdings.items() if key.model not in others}

    def tick(self) -> None:
        """Let models leave that no trunk needs any more."""
        now = self._clock()
        live = self._control.publisher.routers(now)
        for name, until in list(self._leaving.items()):
            trunks = re.compile(rf"trunk-{re.escape(name)}-[0-9a-f]+")
            if now >= until or not any(map(trunks.fullmatch, live)):
                del self._leaving[name], self._models[name]
                remove_model(self._control, name)
                self._left()
                log.info("model %s is served no more", name)

    def is_left(self, model: str) -> bool:
        """Return whether a model that leaves is still served, or known to some host."""
        return model in self._leaving or any(
            ref.name == model for one in self._reports.values() for ref, _ in one.models
        )

    # ---- parts ----------------------------------------------------------------------------------

    def _is_strange(self, ref: ModelRef) -> bool:
        """Return whether a host's model is served no more, or is another one by now."""
        known = self._models.get(ref.name)
        if known is None:
            # One without a folder was attached by a program, and after a restart of the controller
            # only hosts know it.
            return ref.path is not None
        return known[0] != ref

    def _check(
        self, gone: Iterable[str], fresh: Iterable[DeployedModel], stays: Iterable[DeployedModel]
    ) -> None:
        for name in gone:
            check_leaves(self._control, name)
        for one in stays:
            ref, shape = self._models[one.ref.name]
            if one.ref != ref or one.shape != _like(shape, one.shape):
                raise ValueError(f"models.{ref.name}: it has to leave before it is another model")
        for one in fresh:
            name = one.ref.name
            if name in self._models and name not in self._leaving:
                raise ValueError(
                    f"models.{name}: a program has attached a model of this name; choose another "
                    "name, or end that program"
                )
            if self.is_left(name):
                raise ValueError(
                    f"models.{name}: hosts still forget the model that had this name; try again "
                    "in a moment"
                )

    def _check_room(self, wanted: Deployment) -> None:
        """Check that the hosts that stay and come have room for all models."""
        attached = [
            shape
            for name, (_, shape) in self._models.items()
            if name not in self.deployment.names and name not in self._leaving
        ]
        shapes = [*(one.shape for one in wanted.models), *attached]
        hosts = self._sizing.hosts_after(wanted)
        for shape in shapes:
            if shape.replicas > len(hosts):
                raise ValueError(
                    f"models.{shape.model}.replicas: {shape.replicas} replicas of an expert need "
                    f"as many hosts, and there would be {len(hosts)}, since groups keep the size "
                    "that operators and the autoscaler gave them; `moesaic scale` them first"
                )
        if why := capacity_shortage(hosts, shapes, redundancy=0):
            raise ValueError(f"hosts: {why}; give hosts more slots or memory_gb, or add hosts")

    async def _settled(self) -> None:
        """Wait until the last change is stored and made. Raises ClusterError."""
        if self._changing is None:
            return
        try:
            await asyncio.wait_for(asyncio.shield(self._changing), STORE_S)
        except TimeoutError:
            raise ClusterError(
                f"the change cannot be stored yet, since Ray's GCS has not answered for "
                f"{STORE_S:g} s; it happens if the GCS comes back: see `moesaic status`"
            ) from None
        except (RayError, ConnectionError, RuntimeError) as error:
            raise ClusterError(
                f"the change cannot be stored, so that nothing has changed: {error}"
            ) from error
        finally:
            if self._changing.done():
                self._changing = None

    async def _store_and_change(
        self,
        wanted: Deployment,
        gone: Iterable[str],
        fresh: Iterable[DeployedModel],
        stays: Iterable[DeployedModel],
        who: str,
    ) -> None:
        # In a thread: the store does not answer while Ray's GCS is down.
        await asyncio.to_thread(store_deployment, self._namespace, wanted)
        self.deployment = wanted
        self._change(gone, fresh, stays, who)

    def _change(
        self,
        gone: Iterable[str],
        fresh: Iterable[DeployedModel],
        stays: Iterable[DeployedModel],
        who: str,
    ) -> None:
        control, spec = self._control, self.deployment.spec
        # Their trunks may still answer requests.
        until = self._clock() + spec.drain_s + LEAVE_S
        self._leaving |= dict.fromkeys(gone, until)
        for one in stays:
            change_model(control, one.shape)
            self._models[one.ref.name] = one.ref, one.shape
        follow(control, spec.balance.policy)
        self._sizing.follow(self.deployment, who)
        failed: list[MoesaicError] = []
        for one in fresh:
            try:
                self._adopt(one.ref, one.shape)
            except MoesaicError as error:  # the folder of its updates, say
                failed.append(error)
        if failed:
            raise failed[0]


def _like(shape: ModelShape, other: ModelShape) -> ModelShape:
    """Return a shape with what another one has of the things that may change at any time."""
    return replace(shape, replicas=other.replicas, idle_s=other.idle_s)
