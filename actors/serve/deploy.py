"""Deploy the endpoint of a cluster: the trunks of each model, and the ingress."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace

from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from ...cluster.service.web_guard import is_loopback
from ...cluster.spec.deployment import Deployment, PlacedEndpoint, version_of
from ...cluster.spec.monitoring import MonitoringSpec
from ...cluster.spec.spec import Spec
from ...proto.errors import ClusterError
from ..runtime.ray_border import last_line, namespace_of
from ..store.durable_state import INGRESS_PART, note_part
from ..store.start_failures import PartKind, StartFailure, describe_failures
from .replica.ingress import ingress
from .replica.ingress_plan import StoredPlan, fixed_part
from .replica.names import trunk_app
from .replica.trunk import START_TIMEOUT_S
from .serve_border import (
    ServeAddress,
    app_name,
    find_monitoring,
    is_head_node,
    start_serve,
    wait_answers,
    wait_monitored,
)
from .trunk_apps import deploy_trunks

_LOOK_S = 0.1


def place_endpoint(spec: Spec, place: ServeAddress) -> PlacedEndpoint:
    """Return where the endpoint and its monitoring will be. Raises ClusterError."""
    endpoint = PlacedEndpoint(host=place.host, url=place.url, monitoring=None, monitoring_url=None)
    return place_monitoring(spec, endpoint)


def place_monitoring(spec: Spec, endpoint: PlacedEndpoint) -> PlacedEndpoint:
    """Return an endpoint with its monitoring where the spec wants it. Raises ClusterError."""
    there, wanted = endpoint.monitoring, spec.monitoring
    if there is not None and wanted is not None:
        same = (there.host, there.port) == (wanted.host, wanted.port or there.port)
        if same:
            return endpoint  # its port is taken: by the ingress itself
    watched = find_monitoring(spec)
    return replace(
        endpoint,
        monitoring=watched and MonitoringSpec(host=watched.host, port=watched.port),
        monitoring_url=watched and watched.url,
    )


def deploy_endpoint(deployment: Deployment, place: ServeAddress) -> None:
    """Begin to serve the cluster's models over HTTP; `wait_endpoint` waits until they answer.

    The deployment must be stored: the ingress reads it. Raises ClusterError; the caller then ends
    what had started with `leave_serve`.
    """
    spec = deployment.spec
    with saying_why(spec):
        start_serve(place, spec.name)
        deploy_trunks(deployment, deployment.names)
        deploy_ingress(deployment, place.prefix)


def deploy_ingress(deployment: Deployment, prefix: str) -> None:
    """Let Serve start the ingress, or another one if it has to start anew."""
    target = serve.RunTarget(ingress_app(deployment), app_name(deployment.spec), prefix)
    serve.run_many([target], wait_for_applications_running=False)
    note_ingress(deployment)


def note_ingress(deployment: Deployment) -> None:
    """Note with what Serve was asked to start the ingress."""
    version = version_of(fixed_part(deployment))
    note_part(namespace_of(deployment.spec.name), INGRESS_PART, version)


def ingress_app(deployment: Deployment) -> Application:
    """Return the ingress of a stored deployment."""
    spec = deployment.spec
    return ingress(
        StoredPlan(namespace_of(spec.name)),
        spec.drain_s,
        version_of(fixed_part(deployment)),
        deployment.log_environment,
    )


def wait_endpoint(deployment: Deployment) -> str | None:
    """Wait until all models answer at the endpoint. Raises ClusterError if one does not start.

    Returns the address of its monitoring, or None where this machine cannot reach it.
    """
    spec, place = deployment.spec, deployment.endpoint
    assert place is not None
    with saying_why(spec):
        for name in deployment.names:
            wait_running(trunk_app(namespace_of(spec.name), name))
        wait_running(app_name(spec))
    wait_answers(place.url, deployment.names)
    watched = place.monitoring
    if watched is None or (is_loopback(watched.host) and not is_head_node()):
        return None
    assert place.monitoring_url is not None
    wait_monitored(place.monitoring_url, deployment.names)
    return place.monitoring_url


def wait_running(app: str) -> None:
    """Wait until an application of Serve runs as it was asked for last. Raises RuntimeError."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while (found := serve.status().applications.get(app)) is not None:
        if found.status == ApplicationStatus.RUNNING:
            return
        if found.status == ApplicationStatus.DEPLOY_FAILED:
            raise RuntimeError(found.message)
        if time.monotonic() > deadline:
            raise RuntimeError(f"its replicas did not start within {START_TIMEOUT_S:g} s")
        time.sleep(_LOOK_S)
    raise RuntimeError("it was deleted while it started")


@contextlib.contextmanager
def saying_why(spec: Spec) -> Iterator[None]:
    """Raise an error of Ray or Serve as a ClusterError that names the part that failed."""
    try:
        yield
    except (RayError, RayServeException, RuntimeError, ValueError) as error:
        why = describe_failures(namespace_of(spec.name)) or _serves_words(spec) or str(error)
        raise ClusterError(f"endpoint: {why}") from error


def _serves_words(spec: Spec) -> str:
    """Return Serve's message for the first part that failed, or "".

    A process that was killed cannot report why itself.
    """
    namespace = namespace_of(spec.name)
    apps: dict[str, tuple[PartKind, str]] = {
        trunk_app(namespace, model.name): ("trunk", model.name) for model in spec.models
    }
    apps[namespace] = ("ingress", "ingress")  # it may fail for want of a trunk
    try:
        found = serve.status().applications
    except (RayError, RayServeException, RuntimeError, LookupError):
        return ""
    for app, (kind, name) in apps.items():
        for one in found[app].deployments.values() if app in found else ():
            if "FAIL" in one.status:
                words = last_line(RuntimeError(one.message))
                if "ActorDied" in words:
                    words = f"its process was killed or ended by itself ({words.rstrip('()')})"
                return StartFailure(kind, name, words).describe(spec.name)
    return ""
