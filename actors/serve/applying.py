"""Let a running cluster follow another spec: what that changes, and the steps that change it.

`Cluster.apply` and `build` (a deployment by Ray Serve) share it. Everything that differs is found
by comparing what processes would be started with, so what is not named goes on untouched.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import serve

from ...cluster.reports.applying import ApplyReport
from ...cluster.spec.deployment import DeployedModel, Deployment, regrouped, version_of
from ...cluster.spec.differences import check_changeable, differences
from ...cluster.spec.parts import EndpointSpec
from ...cluster.spec.spec import Spec
from ...proto.errors import ClusterError
from ..router_service.service_actor import restart_router_service, service_address, service_part
from ..runtime.ray_border import controller_of, namespace_of, ray_get
from ..store.durable_state import (
    INGRESS_PART,
    SERVICE_PART,
    noted_part,
    stored_deployment,
)
from ..store.start_failures import forget_start_failures
from .beginning import Progress, make_update_folders, prepare, threads_of_trunks
from .deploy import deploy_ingress, place_monitoring, saying_why, wait_endpoint
from .launch import wait_loaded
from .replica.ingress_plan import fixed_part
from .replica.names import INGRESS, app_model, trunk_app
from .serve_border import app_name, end_apps, find_serve
from .trunk_apps import deploy_trunks, trunk_version

log = logging.getLogger(__name__)

ASK_S = 20.0
# For the first answer of an actor: Ray may have to start a worker process.
BEGIN_S = 60.0
# For hosts to forget a model, beside the time for its requests and for the end of its trunks.
FORGET_S = 120.0
LOOK_S = 0.2


@dataclass(frozen=True, slots=True)
class PlannedChange:
    """What another spec changes in a running cluster."""

    report: ApplyReport
    before: Deployment
    after: Deployment
    replaced: frozenset[str]  # models that leave before another one of their name comes
    new_ingress: bool
    new_service: bool
    new_trunks: bool
    by_serve: bool  # Serve itself starts the ingress anew, and says how its parts are doing


def as_served(spec: Spec, host: str, port: int) -> Spec:
    """Return the spec of a cluster that Serve deploys: its Ray and its address are Serve's."""
    endpoint = (spec.endpoint or EndpointSpec()).model_copy(update={"host": host, "port": port})
    ray_spec = spec.ray.model_copy(update={"address": "auto"})
    return spec.model_copy(update={"ray": ray_spec, "endpoint": endpoint})


def plan_change(
    before: Deployment,
    spec: Spec,
    progress: Progress,
    warn: Callable[[str], None],
    *,
    served_at: str | None = None,
) -> PlannedChange:
    """Find out what ``spec`` changes, without changing anything.

    ``served_at``: Serve deploys the cluster at this address, and asks for the change. Models that
    are not on this machine are downloaded. Raises SpecError for what a running cluster cannot
    follow, and CheckpointError, UnsupportedModel and ClusterError.
    """
    served = find_serve()
    declared = served is not None and app_name(before.spec) in served.declared
    if declared and before.spec.endpoint is not None:
        spec = as_served(spec, before.spec.endpoint.host, before.spec.endpoint.port)
    check_changeable(before.spec, spec)
    models = prepare(spec, progress, warn, local=False, runs=True)
    after = _after(before, spec, models, served_at)
    known = {one.ref.name: one for one in before.models}
    stays = [one for one in after.models if one.ref.name in known]
    replaced = {one.ref.name for one in stays if _is_another(known[one.ref.name], one)}
    trunks = [
        one.ref.name
        for one in stays
        if spec.endpoint is not None
        and one.ref.name not in replaced
        and trunk_version(after, one.ref) != trunk_version(before, one.ref)
    ]
    # A new group restarts nothing, nor does one that goes; both together are a replacement.
    goes = any(number not in after.order for number in before.order)
    places = [n for n, number in enumerate(after.order) if goes and number not in before.groups]
    # With what runs: a change that was interrupted may have stored more than it has done.
    namespace = namespace_of(spec.name)
    ingress, service = noted_part(namespace, INGRESS_PART), noted_part(namespace, SERVICE_PART)
    new_ingress = spec.endpoint is not None and ingress != version_of(fixed_part(after))
    wanted = None if after.router is None else version_of(service_part(after))
    new_service = service != wanted
    restarts = [
        *(f"model {name}: not served until it is loaded again" for name in sorted(replaced)),
        *(f"the trunks of model {name}, one after the other" for name in trunks),
        *(f"the hosts of group {place}: others take over, then these leave" for place in places),
        *(["the endpoint's process: the next one takes over"] if new_ingress else []),
        *(["the router service: calls are refused for seconds"] if new_service and service else []),
    ]
    report = ApplyReport(
        cluster=spec.name,
        differences=differences(before.spec, spec),
        restarts=restarts,
        applied=False,
    )
    if declared and new_ingress and served_at is None:
        raise ClusterError(
            "endpoint, monitoring: this needs another ingress, and `serve deploy` has deployed "
            "this one; change the args there"
        )
    gone = frozenset(replaced)
    return PlannedChange(
        report,
        before,
        after,
        replaced=gone,
        new_ingress=new_ingress,
        new_service=new_service,
        new_trunks=bool(trunks),
        by_serve=served_at is not None,
    )


def carry_out(change: PlannedChange, who: str, progress: Progress) -> None:
    """Let the cluster follow; requests for what is not named in ``restarts`` go on.

    Wait until everything is as it was asked for, unless Serve deploys the cluster. Raises
    ClusterError: also if somebody else has changed the cluster since the change was planned, and
    then nothing has changed.
    """
    before, after = change.before, change.after
    namespace = namespace_of(after.spec.name)
    make_update_folders(after.models)
    forget_start_failures(namespace)
    # Hosts may still forget a model that left a moment ago.
    _wait_forgotten(after.spec, set(after.names) - set(before.names), progress)
    if change.replaced:
        between = _without(after, change.replaced)
        _step(before, between, who, progress, lenient=change.by_serve, then=after)
        _wait_forgotten(after.spec, change.replaced, progress)
        before = between
    _step(before, after, who, progress, lenient=change.by_serve)
    if change.new_ingress and not change.by_serve:
        _restart_ingress(after)
    if change.new_service:
        restart_router_service(after)
    if change.by_serve:
        return
    wait_loaded(after.spec, namespace, controller_of(namespace), progress)
    if after.endpoint is not None:
        progress("following the spec", 0, 1)
        wait_endpoint(after)
        if change.new_trunks:
            _tell_ingress(after.spec, (), progress)  # their limits may be others
        progress("following the spec", 1, 1)
    _wait_left(after.spec, progress)


# ---- what is to be ------------------------------------------------------------------------------


def _after(
    before: Deployment, spec: Spec, models: list[DeployedModel], served_at: str | None
) -> Deployment:
    groups, order = regrouped(before, spec)
    same_threads = before.spec.trunk.threads == spec.trunk.threads
    place = before.endpoint
    if place is not None and spec.monitoring != before.spec.monitoring:
        place = place_monitoring(spec, place)
    if place is not None and served_at is not None:
        place = replace(place, url=served_at)
    same_service = before.spec.router == spec.router
    return replace(
        before,
        spec=spec,
        models=models,
        groups=groups,
        order=order,
        trunk_threads=before.trunk_threads if same_threads else threads_of_trunks(spec),
        endpoint=place,
        router=before.router if same_service else service_address(spec),
    ).as_stored


def _is_another(before: DeployedModel, after: DeployedModel) -> bool:
    """Return whether a model of the same name has to be loaded anew."""
    shape = replace(before.shape, replicas=after.shape.replicas, idle_s=after.shape.idle_s)
    return (before.ref, shape) != (after.ref, after.shape)


def _without(deployment: Deployment, names: frozenset[str]) -> Deployment:
    spec = deployment.spec
    left = tuple(model for model in spec.models if model.name not in names)
    return replace(
        deployment,
        spec=spec.model_copy(update={"models": left}),
        models=[one for one in deployment.models if one.ref.name not in names],
    )


# ---- the steps ----------------------------------------------------------------------------------


def _step(
    before: Deployment,
    after: Deployment,
    who: str,
    progress: Progress,
    *,
    lenient: bool,
    then: Deployment | None = None,
) -> None:
    """Change the cluster; no model is another one after this step than before.

    What follows (``then``) is checked before this step is taken. With ``lenient`` an ingress that
    does not answer is no error: Serve starts another one, which reads what is stored.
    """
    spec, namespace = after.spec, namespace_of(after.spec.name)
    controller = controller_of(namespace)
    asked = controller.reshape.remote(before.to_json(), after, who, then)
    ray_get(asked, ASK_S, "the controller: another spec")
    if after.endpoint is None:
        return
    running = find_serve()
    apps = [] if running is None else running.of(namespace)
    gone = [model for app in apps if (model := app_model(app)) and model not in after.names]
    with saying_why(spec):
        deploy_trunks(after, after.names, before.names)
        if app_name(spec) in apps:
            try:
                _tell_ingress(spec, gone, progress)
            except ClusterError as error:
                if not lenient:
                    raise
                log.warning("the endpoint that runs does not follow the spec: %s", error)
        end_apps([trunk_app(namespace, model) for model in gone])


def _tell_ingress(spec: Spec, gone: Collection[str], progress: Progress) -> None:
    """Let the ingress follow what is stored, and wait for requests of models that are gone."""
    ingress: Any = ray.remote(IngressCaller).options(num_cpus=0).remote(app_name(spec))
    try:
        ray_get(ingress.refresh.remote(), BEGIN_S, "the endpoint: another spec")
        if gone:
            _wait_answers(ingress, list(gone), spec.drain_s, progress)
    finally:
        ray.kill(ingress)


class IngressCaller:
    """Calls the ingress from a Ray actor of its own, like `draining.IngressDrain`."""

    def __init__(self, app: str) -> None:
        # While Serve deploys the application again, it says that it does not exist.
        self._ingress: Any = serve.get_deployment_handle(INGRESS, app, _check_exists=False)

    def refresh(self) -> list[str]:
        return self._ingress.refresh.remote().result(timeout_s=ASK_S)

    def leaving(self, models: list[str]) -> int:
        asked = [self._ingress.leaving.remote(model) for model in models]
        return sum(one.result(timeout_s=ASK_S) for one in asked)


def _wait_answers(ingress: Any, models: list[str], drain_s: float, progress: Progress) -> None:
    """Wait at most ``drain_s`` until no request of these models runs any more."""
    deadline, most = time.monotonic() + drain_s, 0
    while (running := ray_get(ingress.leaving.remote(models), ASK_S, "the endpoint")) > 0:
        most = max(most, running)
        progress(f"ending requests of {', '.join(models)}", most - running, most)
        if time.monotonic() > deadline:
            log.warning("%d requests of %s are ended", running, ", ".join(models))
            return
        time.sleep(LOOK_S)


def _restart_ingress(after: Deployment) -> None:
    running = find_serve()
    prefix = None if running is None else running.routes.get(app_name(after.spec))
    with saying_why(after.spec):
        deploy_ingress(after, prefix or "/")


def _wait_forgotten(spec: Spec, names: Collection[str], progress: Progress) -> None:
    controller = controller_of(namespace_of(spec.name))
    deadline = time.monotonic() + spec.drain_s + FORGET_S
    for done, name in enumerate(sorted(names)):
        while ray_get(controller.left.remote(name), ASK_S, "the controller"):
            progress("models leave", done, len(names))
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"models.{name}: hosts have not forgotten the model that it was, and the new "
                    "one is not served yet; see `moesaic status`, and apply the spec again"
                )
            time.sleep(LOOK_S)


def _wait_left(spec: Spec, progress: Progress) -> None:
    """Wait until hosts have left that the spec has no more. Raises ClusterError."""
    controller = controller_of(namespace_of(spec.name))
    deadline = time.monotonic() + spec.timeouts.start_s
    most = 0
    while leaving := ray_get(controller.status.remote(), ASK_S, "status").scaling.leaving_hosts:
        most = max(most, len(leaving))
        progress("hosts leave", most - len(leaving), most)
        if time.monotonic() > deadline:
            raise ClusterError(
                f"timeouts.start_s: {', '.join(leaving)} have not left after "
                f"{spec.timeouts.start_s:g} s; the cluster goes on: see `moesaic status`"
            )
        time.sleep(LOOK_S)


def known_deployment(namespace: str) -> Deployment:
    """Return what a running cluster is to be. Raises ClusterError."""
    found = stored_deployment(namespace)
    if found is None:
        raise ClusterError(f"{namespace}: nothing says what the cluster is to be; it has ended")
    return found
