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

from ...cluster.spec.spec import Spec
from ...proto.errors import ClusterError, MoesaicError
from ..router_service.service_actor import service_address, start_router_service
from ..runtime.embedded_ray import EmbeddedRay
from ..runtime.log_settings import log_settings
from ..runtime.ray_border import cluster_of, namespace_of, ray_get, start_ray
from ..store.start_failures import describe_failures, log_of, start_failures
from .beginning import Progress, begin, check_name, first_deployment, prepare
from .deploy import deploy_endpoint, place_endpoint, wait_endpoint
from .ending import end_cluster, end_own_ray
from .serve_border import find_address

log = logging.getLogger(__name__)

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
    local = spec.ray.address == "local" and not ray.is_initialized()
    models = prepare(spec, progress, warn, local=local)
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

    def has_begun() -> None:
        nonlocal begun
        begun = True

    try:
        check_name(spec)
        noting.on_ray(own_ray)
        place = find_address(spec) if spec.endpoint is not None and models else None
        endpoint = None if place is None else place_endpoint(spec, place)
        deployment = first_deployment(noting.cluster_id, spec, models, endpoint, launched.router)
        controller = begin(deployment, router_key, has_begun)
        if place is not None:
            deploy_endpoint(deployment, place)
        wait_loaded(spec, namespace, controller, progress)
        if launched.router is not None:
            progress("starting the router service", 0, 1)
            start_router_service(deployment)
            progress("starting the router service", 1, 1)
        if deployment.endpoint is not None:
            progress("starting the endpoint", 0, 1)
            launched.monitoring = wait_endpoint(deployment)
            launched.url = deployment.endpoint.url
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


def wait_loaded(spec: Spec, namespace: str, controller: Any, progress: Progress) -> None:
    """Wait until all hosts are up and hold their experts. Raises ClusterError."""
    start_s = spec.timeouts.start_s
    deadline = time.monotonic() + start_s
    desired = ray_get(controller.desired.remote(), start_s, "the controller: start")
    _wait_hosts(namespace, desired, start_s, deadline, progress)
    may_sleep = all(model.idle_s is not None for model in spec.models)
    while spec.models:
        held, wanted, error = ray_get(controller.progress.remote(), 10.0, "the controller")
        progress("loading experts", held, wanted)
        if error:
            raise ClusterError(f"loading experts: {error}; {log_of('host', spec.name)}")
        if held >= wanted and (wanted > 0 or may_sleep):
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
