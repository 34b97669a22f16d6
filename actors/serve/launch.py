"""Start and end a cluster on Ray: hosts, controller, trunks, ingress.

This is the one place that turns a spec into Ray actors. The process that calls `launch` owns them:
they end with it, even when it is killed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util import placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from ...cluster.placement import ModelRef, ModelShape
from ...cluster.scaling.fleet import Fleet
from ...cluster.spec.spec import HostGroup, ModelSpec, Spec
from ...models.source import resolve_model
from ...proto.errors import ClusterError, MoesaicError, describe_error
from ..controller.controller import Controller
from ..controller.host_provisioner import HostProvisioner, HostStarter
from ..preflight.check_updates import update_path
from ..preflight.findings import raise_errors
from ..preflight.preflight import Preflight, bounds_of, preflight, shape_of
from ..router_service.service_actor import service_address, start_router_service
from ..runtime.cluster_secret import make_secret
from ..runtime.durable_state import forget_all, forget_last
from ..runtime.log_settings import log_runtime_env, log_settings
from ..runtime.ray_border import (
    CONTROLLER,
    end_ray,
    namespace_of,
    ray_ends_with_one,
    ray_get,
    start_ray,
)
from ..runtime.start_failures import describe_failures, log_of
from .deploy import deploy_endpoint, wait_endpoint
from .draining import drain
from .end_at_once import begins, is_over
from .serve_border import LEAVE_S, app_name, find_address, find_monitoring, leave_serve

log = logging.getLogger(__name__)

# (step, how many are done, of how many)
Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class Launched:
    """The actors and resources that `launch` started; `close` ends all of them."""

    spec: Spec
    namespace: str
    models: dict[str, ModelRef]
    controller: Any = None
    hosts: dict[str, Any] = field(default_factory=dict)  # until the keeper takes them over
    provisioner: HostProvisioner | None = None
    groups: list[PlacementGroup] = field(default_factory=list)
    begun: bool = False  # this cluster owns the namespace of its name
    serves: bool = False  # some of its deployments may be on Serve
    url: str | None = None
    monitoring: str | None = None  # the address of /status and /metrics
    router: str | None = None  # host:port of the router service
    router_service: Any = None
    owns_ray: bool = False

    def close(self, drain_s: float | None = None, told: Callable[[str], None] = log.info) -> None:
        """End all actors and release all resources, even when ending one fails or is interrupted.

        With ``drain_s`` new requests are refused first, and running ones have that many
        seconds to finish; ``told`` receives the progress line by line.
        """
        log.info("cluster %s ends", self.spec.name)
        # A Ray of the cluster's own takes trunks and ingress along when it ends.
        leaves_serve = self.serves and not (self.owns_ray and ray_ends_with_one())
        with contextlib.ExitStack() as last_first:
            if self.begun:
                last_first.callback(is_over, self.namespace)
            if self.owns_ray:
                last_first.callback(end_ray)
            for group in self.groups:
                last_first.callback(remove_placement_group, group)
            if self.begun:
                last_first.callback(forget_all, self.namespace)
            if self.provisioner is not None:
                last_first.callback(self.provisioner.close)
            for host in self.hosts.values():
                last_first.callback(ray.kill, host, no_restart=True)
            if self.controller is not None:
                last_first.callback(ray.kill, self.controller, no_restart=True)
            if self.router_service is not None:
                last_first.callback(ray.kill, self.router_service, no_restart=True)
            if leaves_serve:
                # What has never answered has nothing to finish.
                patience_s = 0.0 if self.url is None else LEAVE_S
                last_first.callback(leave_serve, self.spec, patience_s=patience_s)
            if drain_s is not None:
                drain(
                    drain_s=drain_s,
                    app=app_name(self.spec) if self.serves else None,
                    router_service=self.router_service,
                    told=told,
                )


def launch(
    spec: Spec,
    progress: Progress,
    warn: Callable[[str], None] = log.warning,
    on_ray: Callable[[], None] = lambda: None,
    router_key: str | None = None,
) -> Launched:
    """Start everything in ``spec`` and wait until it answers.

    ``warn`` receives findings that are odd but harmless. ``on_ray`` is called as soon as this
    process is connected to Ray. ``router_key`` opens the router service; None makes a new key.

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

    owns_ray = start_ray(spec, tried_again)
    progress("starting Ray", 1, 1)
    launched = Launched(
        spec=spec, namespace=namespace_of(spec.name), models=refs, owns_ray=owns_ray
    )
    try:
        on_ray()
        check_name(spec)
        if spec.endpoint is not None and refs:
            find_address(spec)
            find_monitoring(spec)
        begins(launched.namespace)
        launched.begun = True
        forget_last(launched.namespace)
        make_secret(launched.namespace, router_key)
        _start_actors(launched, shapes)
        deployed = None
        if spec.endpoint is not None and refs:
            launched.serves = True
            deployed = deploy_endpoint(
                spec, refs, {m.name: bounds_of(m, checked.described[m.name]) for m in spec.models}
            )
        _wait_loaded(launched, progress)
        if launched.router is not None:
            progress("starting the router service", 0, 1)
            launched.router_service = start_router_service(
                spec, launched.namespace, launched.router
            )
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
            if launched.begun:
                # `close` deletes these records, so they are read first.
                told = describe_failures(launched.namespace)
        except Exception:
            # Logged only, whatever it is: the first error is the cause.
            log.exception("cannot read which part of the cluster failed")
        try:
            launched.close()
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


def _start_actors(launched: Launched, shapes: Mapping[str, ModelShape]) -> None:
    """Start hosts and controller; if one fails, ``launched`` has what had started."""
    spec, namespace, refs = launched.spec, launched.namespace, launched.models
    strategies = [
        strategy
        for group in spec.hosts
        for strategy in _strategies(group, launched.groups, spec.timeouts.start_s)
    ]
    fleet = [group.fleet for group in spec.hosts]
    first = Fleet(fleet, spec.autoscale.policy, pending_s=spec.autoscale.pending_s)
    starter = HostStarter(spec, namespace, _host_threads(spec))
    for (name, group), strategy in zip(first.desired().items(), strategies, strict=True):
        launched.hosts[name] = starter.start(name, group, strategy)
    launched.router = router = service_address(spec)
    launched.controller = (
        ray.remote(Controller)
        .options(
            name=CONTROLLER,
            namespace=namespace,
            max_restarts=-1,
            num_cpus=0,
            **log_runtime_env(),
            # On the owner's node, so that losing a node of hosts does not end the controller.
            scheduling_strategy=NodeAffinitySchedulingStrategy(
                ray.get_runtime_context().get_node_id(), soft=True
            ),
        )
        .remote(
            namespace,
            fleet,
            [(refs[name], shapes[name]) for name in refs],
            spec.balance.policy,
            spec.autoscale,
            None if router is None else (router, spec.timeouts.start_s),
        )
    )
    launched.provisioner = HostProvisioner(starter, launched.controller, launched.hosts)
    launched.hosts = {}


def _strategies(group: HostGroup, groups: list[PlacementGroup], start_s: float) -> list[Any]:
    """Return one scheduling strategy per host of a group.

    Appends the placement group, where one is made, to ``groups``.
    """
    if group.placement_group == "none":
        return [None] * group.count
    bundle = {"CPU": group.num_cpus, "GPU": group.num_gpus, **group.resources}
    bundle = {name: amount for name, amount in bundle.items() if amount > 0} or {"CPU": 0.001}
    made = placement_group(
        [dict(bundle) for _ in range(group.count)], strategy=group.placement_group
    )
    groups.append(made)
    try:
        ray.get(made.ready(), timeout=start_s)
    except GetTimeoutError:
        raise ClusterError(
            f"hosts: Ray could not reserve {group.count} x {bundle} ({group.placement_group}) "
            f"within {start_s:g} s (timeouts.start_s); Ray has {ray.cluster_resources()} in all: "
            "lower hosts.count or the group's resources, or add machines"
        ) from None
    return [PlacementGroupSchedulingStrategy(made, index) for index in range(group.count)]


def _host_threads(spec: Spec) -> int:
    """Return each host's share of a node's cores, if hosts are spread evenly."""
    nodes = max(1, sum(1 for node in ray.nodes() if node["Alive"]))
    per_node = math.ceil(spec.num_hosts / nodes)
    return max(1, (os.cpu_count() or 1) // per_node)


def _wait_loaded(launched: Launched, progress: Progress) -> None:
    deadline = time.monotonic() + launched.spec.timeouts.start_s
    keeper = launched.provisioner
    assert keeper is not None
    hosts = dict(keeper.hosts)
    asked = {host.entry.remote(): name for name, host in hosts.items()}
    while asked:
        progress("starting hosts", len(hosts) - len(asked), len(hosts))
        # A host that fails is reported at once, even while others still wait for a machine.
        ready, rest = ray.wait(list(asked), timeout=max(0.1, deadline - time.monotonic()))
        if not ready:
            raise ClusterError(
                f"timeouts.start_s: {', '.join(asked[ref] for ref in rest)} did not start within "
                f"{launched.spec.timeouts.start_s:g} s; Ray has {ray.available_resources()} left: "
                "ask for fewer hosts or resources, add machines, or raise timeouts.start_s"
            )
        ray_get(ready[0], 1.0, f"{asked.pop(ready[0])}: start")
    progress("starting hosts", len(hosts), len(hosts))
    while launched.models:
        held, wanted, error = ray_get(launched.controller.progress.remote(), 10.0, "the controller")
        progress("loading experts", held, wanted)
        if error:
            raise ClusterError(f"loading experts: {error}; {log_of('host', launched.spec.name)}")
        if held >= wanted > 0:
            return
        if time.monotonic() > deadline:
            raise ClusterError(
                f"timeouts.start_s: after {launched.spec.timeouts.start_s:g} s {held} of {wanted} "
                "replicas of experts were loaded; raise timeouts.start_s if loading takes longer"
            )
        time.sleep(0.1)
