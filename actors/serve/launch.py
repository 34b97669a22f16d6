"""Start a cluster on Ray: controller, hosts, trunks, ingress and router service.

They belong to no process: the one that calls `launch` may go, and `ending.end_cluster` ends them.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ...cluster.placement import ModelRef
from ...cluster.spec.deployment import Deployment
from ...cluster.spec.spec import ModelSpec, Spec
from ...models.source import resolve_model
from ...proto.errors import ClusterError, MoesaicError, describe_error
from ..controller.controller import Controller
from ..preflight.check_updates import update_path
from ..preflight.findings import raise_errors
from ..preflight.preflight import Preflight, bounds_of, preflight, shape_of
from ..router_service.service_actor import service_address, start_router_service
from ..runtime.embedded_ray import EmbeddedRay
from ..runtime.log_settings import log_runtime_env, log_settings
from ..runtime.placement_groups import reserve
from ..runtime.ray_border import CONTROLLER, cluster_of, namespace_of, ray_get, start_ray
from ..store.cluster_secret import make_secret
from ..store.durable_state import claim, forget_last, store_deployment
from ..store.start_failures import describe_failures, log_of, start_failures
from ..tracing.start import store_traces
from .deploy import deploy_endpoint, wait_endpoint
from .end_at_once import begins
from .ending import end_cluster, end_leftovers, end_own_ray
from .serve_border import find_address, find_monitoring

log = logging.getLogger(__name__)

# (step, how many are done, of how many)
Progress = Callable[[str, int, int], None]
LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class Noting:
    """How whoever starts a cluster notes it, so that it can be ended whatever happens."""

    cluster_id: str = ""
    # Called when this process is connected to Ray and before anything starts there, with the Ray if
    # it is Moesaic's own; and when a start that failed has been undone.
    on_ray: Callable[[EmbeddedRay | None], None] = lambda _: None
    undone: Callable[[], None] = lambda: None


@dataclass(slots=True)
class Launched:
    """A cluster that `launch` started; it belongs to no process, and `end_cluster` ends it."""

    namespace: str
    ray: EmbeddedRay | None  # None: it is not Moesaic's own
    url: str | None = None
    monitoring: str | None = None  # the address of /status and /metrics
    router: str | None = None  # host:port of the router service


def launch(
    spec: Spec,
    progress: Progress,
    warn: Callable[[str], None] = log.warning,
    noting: Noting = Noting(),
    router_key: str | None = None,
) -> Launched:
    """Start everything in ``spec`` and wait until it answers.

    ``warn`` receives findings that are odd but harmless. ``router_key`` opens the router service;
    None makes a new key.

    Raises SpecError, CheckpointError, UnsupportedModel and ClusterError, after ending what had
    started.
    """
    log_settings()  # every process reads them, and a wrong value would keep it from starting
    checked = _check(spec, progress, warn)
    refs, shapes = {}, {}
    for model in spec.models:
        folder, described = checked.folders[model.name], checked.described[model.name]
        refs[model.name] = ModelRef(
            name=model.name,
            dtype=model.dtype,
            path=str(folder),
            updates=_update_folder(model),
            learns=model.train,
        )
        shapes[model.name] = shape_of(model, described)
    log.info("cluster %s starts", spec.name)
    progress("starting Ray", 0, 1)

    def tried_again(why: str) -> None:
        log.warning(why)
        progress("starting Ray once more", 0, 1)

    own_ray = start_ray(spec, tried_again)
    progress("starting Ray", 1, 1)
    namespace = namespace_of(spec.name)
    launched = Launched(namespace, own_ray, router=service_address(spec))
    begun = False  # the namespace is this cluster's
    try:
        check_name(spec)
        noting.on_ray(own_ray)
        if spec.endpoint is not None and refs:
            find_address(spec)
            find_monitoring(spec)
        claim(namespace, spec.timeouts.start_s)
        begins(namespace)
        begun = True
        end_leftovers(namespace)
        forget_last(namespace)
        make_secret(namespace, router_key)
        store_traces(namespace, spec.traces.settings)
        models = [(refs[name], shapes[name]) for name in refs]
        deployment = Deployment(
            id=noting.cluster_id, spec=spec, models=models, router=launched.router
        )
        controller = _start(namespace, deployment)
        deployed = None
        if spec.endpoint is not None and refs:
            deployed = deploy_endpoint(
                spec, refs, {m.name: bounds_of(m, checked.described[m.name]) for m in spec.models}
            )
        _wait_loaded(spec, namespace, controller, progress)
        if launched.router is not None:
            progress("starting the router service", 0, 1)
            start_router_service(spec, namespace, launched.router)
            progress("starting the router service", 1, 1)
        if deployed is not None:
            progress("starting the endpoint", 0, 1)
            launched.url, launched.monitoring = wait_endpoint(spec, deployed, refs)
            progress("starting the endpoint", 1, 1)
        log.info(
            "cluster %s is up",
            spec.name,
            extra={
                "url": launched.url,
                "monitoring": launched.monitoring,
                "router_service": launched.router,
            },
        )
    except BaseException as error:
        told = ""
        try:
            if begun:
                # The cluster's end deletes these records, so they are read first.
                told = describe_failures(namespace)
        except Exception:
            # Logged only, whatever it is: the first error is the cause.
            log.exception("cannot read which part of the cluster failed")
        try:
            if begun:
                end_cluster(spec.name, own_ray)
            elif own_ray is not None:
                end_own_ray(own_ray, namespace)
            noting.undone()
        except Exception:
            # Logged only: the caller gets the first error, which is the cause.
            log.exception("could not end everything that had started")
        if isinstance(error, MoesaicError) and told and told not in str(error):
            raise ClusterError(told) from error
        raise
    return launched


def _check(spec: Spec, progress: Progress, warn: Callable[[str], None]) -> Preflight:
    """Check the spec before anything is downloaded, and again when all models are local.

    Raises one error that lists every problem that keeps the cluster from starting.
    """
    local = spec.ray.address == "local" and not ray.is_initialized()
    checked = preflight(spec, local=local)
    raise_errors(checked.findings)
    absent = [model for model in spec.models if model.name not in checked.folders]
    for model in absent:
        resolve_model(model.path, progress=progress)
    if absent:
        checked = preflight(spec, local=local)
        raise_errors(checked.findings)
    for finding in checked.findings:
        warn(f"{finding.severity}: {finding}")
    for card in checked.cards:
        log.info("%s", card)
    return checked


def _update_folder(model: ModelSpec) -> str | None:
    """Return the folder of a model's updates, after making it. Raises ClusterError."""
    if model.updates is None:
        return None
    folder = update_path(model.updates)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClusterError(f"updates: {folder} cannot be made: {describe_error(error)}") from error
    return str(folder)


def check_name(spec: Spec) -> None:
    """Raise ClusterError if a cluster of the same name runs on this Ray."""
    with contextlib.suppress(ValueError):
        ray.get_actor(CONTROLLER, namespace=namespace_of(spec.name))
        raise ClusterError(
            f"name: a cluster {spec.name!r} is running; `moesaic down --name {spec.name}` ends it"
        )


def _start(namespace: str, deployment: Deployment) -> Any:
    """Reserve what hosts need, store what the cluster is to be, and start its controller."""
    spec = deployment.spec
    for number, group in enumerate(spec.hosts):
        reserve(namespace, number, group, spec.timeouts.start_s)
    store_deployment(namespace, deployment)
    return (
        ray.remote(Controller)
        .options(
            name=CONTROLLER,
            namespace=namespace,
            lifetime="detached",
            max_restarts=-1,
            num_cpus=0,
            **log_runtime_env(),
            # On this node, so that losing a node of hosts does not end the controller.
            scheduling_strategy=NodeAffinitySchedulingStrategy(
                ray.get_runtime_context().get_node_id(), soft=True
            ),
        )
        .remote(namespace)
    )


def _wait_loaded(spec: Spec, namespace: str, controller: Any, progress: Progress) -> None:
    """Wait until all hosts are up and hold their experts. Raises ClusterError."""
    start_s = spec.timeouts.start_s
    deadline = time.monotonic() + start_s
    desired = ray_get(controller.desired.remote(), start_s, "the controller: start")
    _wait_hosts(namespace, desired, start_s, deadline, progress)
    while spec.models:
        held, wanted, error = ray_get(controller.progress.remote(), 10.0, "the controller")
        progress("loading experts", held, wanted)
        if error:
            raise ClusterError(f"loading experts: {error}; {log_of('host', spec.name)}")
        if held >= wanted > 0:
            return
        if time.monotonic() > deadline:
            raise ClusterError(
                f"timeouts.start_s: after {start_s:g} s {held} of {wanted} replicas of experts "
                "were loaded; raise timeouts.start_s if loading takes longer"
            )
        time.sleep(LOOK_S)


def _wait_hosts(
    namespace: str, names: Collection[str], start_s: float, deadline: float, progress: Progress
) -> None:
    absent = set(names)  # the controller has not asked Ray for them yet
    starting: dict[Any, str] = {}
    while absent or starting:
        progress("starting hosts", len(names) - len(absent) - len(starting), len(names))
        for name in sorted(absent):
            with contextlib.suppress(ValueError):
                starting[ray.get_actor(name, namespace=namespace).entry.remote()] = name
        absent -= set(starting.values())
        # A host that has failed already has no actor any more.
        for failed in start_failures(namespace):
            if failed.name in absent:
                raise ClusterError(failed.describe(cluster_of(namespace)))
        # A host that fails is reported at once, even while others still wait for a machine.
        ready, _ = ray.wait(list(starting), timeout=LOOK_S) if starting else ([], [])
        for ref in ready:
            ray_get(ref, 1.0, f"{starting.pop(ref)}: start")
        if ready:
            continue
        if time.monotonic() > deadline:
            late = sorted([*absent, *starting.values()])
            raise ClusterError(
                f"timeouts.start_s: {', '.join(late)} did not start within {start_s:g} s; Ray has "
                f"{ray.available_resources()} left: ask for fewer hosts or resources, add "
                "machines, or raise timeouts.start_s"
            )
        if absent:
            time.sleep(LOOK_S)
    progress("starting hosts", len(names), len(names))
