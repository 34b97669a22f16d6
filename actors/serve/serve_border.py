"""Use Ray Serve, a service that one Ray has once and that other clusters and programs may share.

Serve listens at one address for all applications and tells them apart by their path prefix. Whoever
starts Serve chooses that address; Serve ignores what others ask for later. So its options are
compared with the spec before anything of a cluster starts, and the endpoint is asked once Serve
says that it is up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import httpx
import ray
from pydantic import ValidationError
from ray import serve
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.serve._private.common import REPLICA_ID_FULL_ID_STR_PREFIX as _REPLICA
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.config import ControllerOptions, HTTPOptions, ProxyLocation
from ray.serve.context import _set_global_client

from ...cluster.reports.status import EndpointStatus
from ...cluster.service.web_guard import is_loopback
from ...cluster.spec.parts import EndpointSpec
from ...cluster.spec.spec import Spec
from ...proto.errors import ClusterError, describe_error
from ..endpoint.http.proxy_middleware import HOOK, middlewares
from ..runtime.ports import check_port, free_port
from ..runtime.ray_border import (
    CONTROLLER,
    HEAD_NODE,
    cluster_of,
    kill_named,
    namespace_of,
    ray_get,
)
from .replica.names import app_namespace

log = logging.getLogger(__name__)

# Time for the endpoint to answer after all its deployments have started.
ANSWER_S = 30.0
ASK_S = 20.0
END_S = 30.0
# Time for an application to end. Its requests are over by then; trunks still close their engines.
LEAVE_S = 20.0
_LOOK_S = 0.2
_ANYWHERE = ("0.0.0.0", "::")
# In Ray's key-value store: the cluster that started Serve. The last cluster to leave ends a Serve
# that a cluster started.
_STORE, _STARTED_BY = "moesaic", "serve-started-by"


@dataclass(frozen=True, slots=True)
class ServeAddress:
    """The address at which the endpoint of a cluster is, or will be."""

    host: str
    port: int
    prefix: str = "/"
    serve_runs: bool = False

    @property
    def url(self) -> str:
        host = head_address() if self.host in _ANYWHERE else self.host
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.port}{self.prefix.rstrip('/')}"


@dataclass(frozen=True, slots=True)
class ServeState:
    """The state of the Serve that runs on a Ray."""

    http: HTTPOptions
    location: ProxyLocation | None
    routes: dict[str, str | None]  # application -> path prefix; None: not reachable over HTTP
    declared: frozenset[str] = frozenset()  # applications of `serve deploy`

    @property
    def applications(self) -> str:
        return ", ".join(sorted(self.routes)) or "none"

    def of(self, namespace: str) -> list[str]:
        """Return the applications of a cluster, its ingress first."""
        return sorted(app for app in self.routes if app_namespace(app) == namespace)


def app_name(spec: Spec) -> str:
    """Return the name of the Serve application of the cluster's ingress."""
    return namespace_of(spec.name)


def serves(cluster: str) -> bool:
    """Return whether the cluster has an application on Serve."""
    running = find_serve()
    return running is not None and bool(running.of(namespace_of(cluster)))


def find_address(spec: Spec) -> ServeAddress:
    """Return where the endpoint can be on the Ray that this process is connected to.

    First ends the applications of clusters whose owners died. Raises ClusterError where Serve
    runs with options that do not fit the spec.
    """
    endpoint = spec.endpoint
    assert endpoint is not None
    _end_orphans()
    running = find_serve()
    if running is None:
        if _on_head_node(endpoint.host):
            check_port("endpoint", endpoint.host, endpoint.port)
        return ServeAddress(endpoint.host, endpoint.port or free_port(endpoint.host))
    _check(endpoint, spec.name, running)
    _on_head_node(endpoint.host)
    prefix = "/" if "/" not in running.routes.values() else f"/{spec.name}"
    others = {route: app for app, route in running.routes.items() if app != app_name(spec)}
    if prefix in others:
        raise ClusterError(
            f"name: Serve on this Ray already has the application {others[prefix]!r} at {prefix}; "
            "choose another name, or end that application"
        )
    assert running.http.host is not None
    return ServeAddress(running.http.host, running.http.port, prefix, serve_runs=True)


def serve_address(app: str) -> ServeAddress:
    """Return where the Serve that runs on this Ray serves an application. Raises ClusterError."""
    running = find_serve()
    if running is None or running.location == ProxyLocation.Disabled or not running.http.host:
        raise ClusterError("Ray Serve serves no HTTP here; set proxy_location and http_options")
    prefix = running.routes.get(app) or "/"
    return ServeAddress(running.http.host, running.http.port, prefix, serve_runs=True)


def find_monitoring(spec: Spec) -> ServeAddress | None:
    """Return where the monitoring will be: on the head node, like the endpoint.

    Raises ClusterError where its port is taken there.
    """
    wanted = spec.monitoring
    if wanted is None:
        return None
    if not is_head_node():
        # A port that is free here is probably free on the head node; if not, the ingress waits.
        return ServeAddress(wanted.host, wanted.port or free_port("localhost"))
    check_port("monitoring", wanted.host, wanted.port)
    return ServeAddress(wanted.host, wanted.port or free_port(wanted.host))


def start_serve(place: ServeAddress, name: str) -> None:
    """Start Serve for the cluster ``name``, unless it runs."""
    if place.serve_runs:
        return
    quiet_serve()
    door = f"{middlewares.__module__}.{middlewares.__name__}"
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": place.host, "port": place.port},
        # The proxy inherits the environment of Serve's controller, which starts it.
        controller_options=ControllerOptions(runtime_env={"env_vars": {HOOK: door}}),
    )
    _internal_kv_put(_STARTED_BY, name, overwrite=True, namespace=_STORE)


def quiet_serve() -> None:
    """Let Serve's library log warnings only: it logs every step to whoever uses it.

    Its import has set another level.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def leave_serve(cluster: str, *, patience_s: float = LEAVE_S, keep: Collection[str] = ()) -> None:
    """End the cluster's applications, and Serve itself where nothing needs it any more.

    Serve ends if it has no other application and was started by this cluster, or by one that is
    gone. Replicas that have not ended within ``patience_s`` are killed. Applications of ``keep``
    are not ended.
    """
    running = find_serve()
    if running is None:
        return
    apps = [app for app in running.of(namespace_of(cluster)) if app not in keep]
    end_apps(apps, patience_s)
    _end_idle_serve(leaving=cluster)


def end_apps(apps: Collection[str], patience_s: float = LEAVE_S) -> None:
    """End applications; replicas that have not ended within ``patience_s`` are killed.

    Raises ClusterError.
    """
    quiet_serve()
    for app in apps:
        serve.delete(app, _blocking=False)
    patient_until = time.monotonic() + patience_s
    deadline = patient_until + END_S
    while (running := find_serve()) is not None:
        left = sorted(running.routes.keys() & set(apps))
        if not left:
            return
        now = time.monotonic()
        if now > deadline:
            raise ClusterError(
                f"the application {left[0]!r} of Ray Serve did not end within {END_S:g} s; `serve "
                "status` shows its state"
            )
        if now > patient_until:
            # Serve does not replace these replicas, since their application is being deleted.
            for app in left:
                kill_named(SERVE_NAMESPACE, f"{_REPLICA}{app}#")
        time.sleep(_LOOK_S)


def wait_monitored(url: str, models: Collection[str], timeout_s: float = ANSWER_S) -> None:
    """Wait until ``/status`` has these models; raise ClusterError where it does not in time.

    Call it only where this machine can reach ``url``.
    """
    deadline = time.monotonic() + timeout_s
    with httpx.Client(trust_env=False, timeout=10.0) as client:
        while (found := _monitored(client, f"{url}/status", models)) is not None:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"monitoring: {url} does not answer within {timeout_s:g} s: {found}; "
                    "if another program uses this port, set monitoring.port to another one"
                )
            time.sleep(_LOOK_S)


def _monitored(client: httpx.Client, url: str, models: Collection[str]) -> str | None:
    """Return what is wrong with the answer, or None."""
    try:
        answer = client.get(url)
        if answer.status_code == 503:
            return None  # one of ours: the controller may be slow
        known = EndpointStatus.model_validate_json(answer.raise_for_status().content).engines
    except ValidationError:
        return "its answer is not the status of a cluster"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return describe_error(error)
    missing = set(models) - known.keys()
    return f"it has the models {sorted(known)}" if missing else None


def wait_answers(url: str, models: Collection[str], timeout_s: float = ANSWER_S) -> None:
    """Wait until the endpoint lists these models; raise ClusterError where it does not in time."""
    deadline = time.monotonic() + timeout_s
    # trust_env=False: a proxy of the network must not answer in place of this machine.
    with httpx.Client(trust_env=False, timeout=5.0) as client:
        while (found := _asked(client, f"{url}/v1/models", models)) is not None:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"endpoint: {url} does not answer for {', '.join(models)} within "
                    f"{timeout_s:g} s: {found}"
                )
            time.sleep(_LOOK_S)


def _asked(client: httpx.Client, url: str, models: Collection[str]) -> str | None:
    """Return what is wrong with the answer, or None."""
    try:
        answer = client.get(url)
        known = {str(one["id"]) for one in answer.raise_for_status().json()["data"]}
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        return describe_error(error)
    missing = set(models) - known
    return f"it serves {sorted(known)}" if missing else None


def find_serve() -> ServeState | None:
    """Return the Serve of the Ray that this process is connected to, or None.

    Ray has no public call for it.
    """
    controller = _controller()
    if controller is None:
        return None
    http = ray_get(controller.get_http_config.remote(), ASK_S, "Serve's options")
    details = ray_get(controller.get_serve_instance_details.remote(), ASK_S, "Serve's applications")
    location = details.get("proxy_location")
    return ServeState(
        http=http,
        location=ProxyLocation(location) if location else None,
        routes={
            name: application.get("route_prefix") or _declared_prefix(application)
            for name, application in details["applications"].items()
        },
        declared=frozenset(
            name
            for name, application in details["applications"].items()
            if application.get("deployed_app_config")
        ),
    )


def _declared_prefix(application: dict[str, Any]) -> str | None:
    """Return the path of an application that Serve is building for `serve deploy`."""
    return (application.get("deployed_app_config") or {}).get("route_prefix")


def _controller() -> Any:
    """Return Serve's controller, or None.

    Serve caches a handle in this process, but another process may have ended that controller.
    """
    try:
        return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return None


def _end_serve() -> None:
    """End Serve.

    `serve.shutdown` would wait for a call that its controller does not live to answer, and Ray
    prints that error on stdout.
    """
    controller = _controller()
    if controller is None:
        return  # another process has ended it
    ray_get(controller.graceful_shutdown.remote(wait=False), ASK_S, "Serve's end")
    deadline = time.monotonic() + END_S
    while _controller() is not None:
        if time.monotonic() > deadline:
            raise ClusterError(
                f"Ray Serve did not end within {END_S:g} s; `serve shutdown` ends it"
            )
        time.sleep(_LOOK_S)
    _set_global_client(None)


def _check(endpoint: EndpointSpec, name: str, running: ServeState) -> None:
    http = running.http
    here = f"Serve on this Ray runs already (applications: {running.applications}) and"
    own = "give the cluster a Ray of its own (`ray: {address: local}`)"
    if running.location == ProxyLocation.Disabled or http.host is None:
        raise ClusterError(
            f"endpoint: {here} serves no HTTP; {own}, or end Serve (`serve shutdown`)"
        )
    asked = (endpoint.host, endpoint.port or http.port)
    if asked != (http.host, http.port):
        path = "" if "/" not in running.routes.values() else f", where this cluster is at /{name}"
        key = "host" if endpoint.host != http.host else "port"
        raise ClusterError(
            f"endpoint.{key}: {getattr(endpoint, key)}, but {here} has one address for all of them,"
            f" {http.host}:{http.port}; set `endpoint: {{host: {http.host}, port: {http.port}}}`"
            f"{path}, or {own}"
        )
    if http.ssl_certfile:
        raise ClusterError(
            f"endpoint: {here} only speaks TLS; {own}, or end Serve (`serve shutdown`)"
        )
    most_s, limit_s = http.request_timeout_s, endpoint.limits.request_s
    if most_s is not None and (limit_s is None or limit_s > most_s):
        raise ClusterError(
            f"endpoint.limits.request_s: {limit_s}, but {here} ends every request after "
            f"{most_s:g} s; set `request_s: {most_s:g}`, or {own}"
        )


def _on_head_node(host: str) -> bool:
    """Return whether Serve, which listens on Ray's head node, listens on this machine.

    Raises ClusterError where ``host`` is loopback and the head node is another machine.
    """
    head = _head()
    if is_head_node():
        return True
    if is_loopback(host):
        raise ClusterError(
            f"endpoint.host: {host} is reached from one machine only, and Serve listens on Ray's "
            f"head node ({head['NodeManagerAddress']}), which is not this machine; set "
            "`host: 0.0.0.0`, or start the cluster on that node"
        )
    return False


def _head() -> dict[str, Any]:
    for node in ray.nodes():
        if node["Alive"] and HEAD_NODE in node["Resources"]:
            return node
    raise ClusterError(
        "ray.address: this Ray has no living head node; restart it with `ray start --head`"
    )


def is_head_node() -> bool:
    """Return whether this process is on Ray's head node."""
    return _head()["NodeID"] == _this_node()


def _this_node() -> str:
    return ray.get_runtime_context().get_node_id()


def head_address() -> str:
    return _head()["NodeManagerAddress"]


def _end_orphans() -> None:
    """End applications of clusters whose controller is gone, and a Serve that only they used."""
    running = find_serve()
    if running is None:
        return
    for namespace in sorted({app_namespace(app) for app in running.routes}):
        name = cluster_of(namespace)
        if namespace in running.declared:
            continue  # Serve may be building it, and its controller follows
        if name != namespace and not _has_controller(namespace):
            log.warning("cluster %s has no controller; ending its applications", name)
            end_apps(running.of(namespace))
    _end_idle_serve()


def _end_idle_serve(leaving: str | None = None) -> None:
    running = find_serve()
    started_by = _internal_kv_get(_STARTED_BY, namespace=_STORE)
    if running is None or running.routes or not started_by:
        return
    name = started_by.decode()
    if name == leaving or not _has_controller(namespace_of(name)):
        _end_serve()
        _internal_kv_put(_STARTED_BY, b"", overwrite=True, namespace=_STORE)


def _has_controller(namespace: str) -> bool:
    try:
        ray.get_actor(CONTROLLER, namespace=namespace)
    except ValueError:
        return False
    return True
