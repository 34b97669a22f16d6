"""The router service as a Ray actor: its start, and the controller's watch over it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ...cluster.expert_keys import LayerKey
from ...cluster.reports.status import (
    RouterServiceProcess,
    RouterServiceState,
    RouterServiceStatus,
)
from ...cluster.spec.deployment import Deployment, version_of
from ...cluster.spec.spec import Spec
from ...proto.errors import ClusterError, describe_error
from ..runtime.garbage import starting_without_collections
from ..runtime.ports import free_port
from ..runtime.process_log import begin_process
from ..runtime.ray_border import (
    cluster_of,
    controller_of,
    named_actors,
    namespace_of,
    ray_get,
    thread_environment,
)
from ..store.durable_state import SERVICE_PART, note_part
from ..store.start_failures import recording_failure
from ..tracing.start import trace_if_wanted

if TYPE_CHECKING:
    from ...kernels.ffn import ExpertForm
    from .service import RouterService

log = logging.getLogger(__name__)

NAME = "router-service"
LOOK_S = 1.0
ASK_S = 5.0
# A service that was up and has not answered for this long counts as frozen and is restarted.
SILENT_S = 30.0
# How long a restarted service retries to listen while its predecessor's sockets still close.
BIND_S = 20.0


class RayRouterService:
    """The Ray actor: a `RouterService` with a router that follows the cluster's placements."""

    def __init__(self, spec: Spec, namespace: str, address: str) -> None:
        with recording_failure(namespace, "router", NAME):
            begin_process("router", NAME, cluster_of(namespace))
            trace_if_wanted(namespace, "router", NAME, cluster_of(namespace))
            with starting_without_collections():
                self._open(spec, namespace, address)

    def _open(self, spec: Spec, namespace: str, address: str) -> None:
        import torch

        from ..router.pool_link import PlacementWatch
        from ..router.router import Router
        from ..runtime.devices import pinned_numa_node
        from ..store.cluster_secret import router_key_of, secret_of
        from .catalog import Catalog

        wanted = spec.router
        assert wanted is not None
        torch.set_num_threads(max(1, wanted.threads))  # without threads it only copies rows
        forms: dict[LayerKey, ExpertForm] = {}  # filled as models become known
        router = Router(
            name=NAME,
            node=ray.get_runtime_context().get_node_id(),
            policy=spec.router_policy,
            transport=spec.network.transport,
            secret=secret_of(namespace),
            numa=pinned_numa_node(),
            forms=forms if wanted.threads and spec.lends else None,
        )
        self._watch = PlacementWatch(namespace, router)

        def models() -> Any:
            return ray_get(controller_of(namespace).models.remote(), ASK_S, "the models")

        key = router_key_of(namespace)
        self._service = _bind(router, Catalog(models, forms=forms), spec, address, key)
        log.info("the router service is ready for calls", extra={"address": self._service.address})

    def report(self) -> RouterServiceProcess:
        return self._service.report()

    def drain(self, drain_s: float) -> int:
        """Drain the service; see `RouterService.drain`."""
        held = self._service.drain(drain_s)
        log.info("the router service refuses new calls; %d held ones have %g s", held, drain_s)
        return held

    def running(self) -> int:
        """Return the number of calls that are held."""
        return self._service.running


def _bind(router: Any, catalog: Any, spec: Spec, address: str, key: str) -> RouterService:
    from .service import RouterService, ServicePolicy

    wanted = spec.router
    assert wanted is not None
    policy = ServicePolicy(
        merge=wanted.policy, max_call_bytes=wanted.max_call_bytes, call_s=wanted.call_s
    )
    until = time.monotonic() + BIND_S
    while True:
        try:
            return RouterService(router, catalog, key=key, bind=address, policy=policy)
        except ClusterError:
            if time.monotonic() >= until:
                raise
        time.sleep(0.2)


def service_address(spec: Spec) -> str | None:
    """Return the address of the service, which it keeps when it is restarted; None: no service."""
    if spec.router is None:
        return None
    return f"{spec.router.host}:{spec.router.port or free_port(spec.router.host)}"


def service_part(deployment: Deployment) -> object:
    """Return what the service takes over when it starts; for more, there has to be another one."""
    spec = deployment.spec
    return spec.router, spec.router_policy, spec.network.transport, spec.lends


def restart_router_service(deployment: Deployment) -> None:
    """Replace the service, or end it where the deployment has none. Raises ClusterError."""
    namespace = namespace_of(deployment.spec.name)
    try:
        ray.kill(ray.get_actor(NAME, namespace=namespace), no_restart=True)
    except ValueError:
        log.info("there was no router service")
    note_part(namespace, SERVICE_PART, None)
    if deployment.router is not None:
        deadline = time.monotonic() + BIND_S
        while NAME in named_actors(namespace):
            if time.monotonic() > deadline:
                raise ClusterError(f"the router service did not end within {BIND_S:g} s")
            time.sleep(LOOK_S / 10)
        start_router_service(deployment)


def start_router_service(deployment: Deployment) -> None:
    """Start the service on this node, and wait until it answers. Raises ClusterError."""
    spec, address = deployment.spec, deployment.router
    namespace = namespace_of(spec.name)
    assert address is not None
    logs = dict(deployment.log_environment)
    threads = 1 if spec.router is None else max(1, spec.router.threads)
    actor: Any = (
        ray.remote(RayRouterService)
        .options(
            name=NAME,
            namespace=namespace,
            lifetime="detached",
            max_restarts=-1,
            num_cpus=0,
            # On this node, because the spec names an address of that node.
            scheduling_strategy=NodeAffinitySchedulingStrategy(
                ray.get_runtime_context().get_node_id(), soft=False
            ),
            runtime_env={"env_vars": thread_environment(threads) | logs},
        )
        .remote(spec, namespace, address)
    )
    try:
        ray_get(actor.report.remote(), spec.timeouts.start_s, "router: start")
    except BaseException:
        ray.kill(actor, no_restart=True)
        raise
    note_part(namespace, SERVICE_PART, version_of(service_part(deployment)))


class ServiceWatch:
    """The controller's watch over the service; `status` shows the result.

    Ray restarts a service that died. The watch kills one that is frozen or computes nothing any
    more, so that Ray restarts it too.
    """

    def __init__(
        self,
        namespace: str,
        address: str,
        start_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to watch the service; ``start_s``: how long its start may take."""
        self._namespace = namespace
        self._address = address
        self._start_s = start_s
        self._state = RouterServiceState.STARTING
        self._error: str | None = None
        self._report: RouterServiceProcess | None = None
        self._clock = clock
        self._heard_at = self._clock()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def close(self) -> None:
        """Watch it no more."""
        self._task.cancel()

    def status(self) -> RouterServiceStatus:
        return RouterServiceStatus(
            address=self._address, state=self._state, error=self._error, process=self._report
        )

    async def _run(self) -> None:
        while True:
            try:
                await self._look()
                self._error = None
            except Exception as error:
                # `status` shows the error, whatever it is; the next look tries again.
                self._state, self._error = RouterServiceState.UNKNOWN, describe_error(error)
                log.exception("the router service could not be checked")
            await asyncio.sleep(LOOK_S)

    async def _look(self) -> None:
        try:
            actor: Any = ray.get_actor(NAME, namespace=self._namespace)
        except ValueError:
            return  # it has not started yet, or has ended
        try:
            self._report = await asyncio.wait_for(actor.report.remote(), ASK_S)
        except RayTaskError as defect:
            self._end(actor, str(defect.cause))
        except TimeoutError:
            patience_s = SILENT_S if self._report else self._start_s
            if self._clock() - self._heard_at > patience_s:
                self._end(actor, f"no answer for {patience_s:g} s")
        except RayActorError:
            self._restarting()
        else:
            self._state = RouterServiceState.UP
            self._heard_at = self._clock()

    def _end(self, actor: Any, why: str) -> None:
        log.warning("the router service is restarted: %s", why)
        ray.kill(actor, no_restart=False)
        self._restarting()

    def _restarting(self) -> None:
        self._state = RouterServiceState.RESTARTING
        self._report = None
        self._heard_at = self._clock()
