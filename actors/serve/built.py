"""What Ray Serve calls when it deploys a cluster (`moesaic.serve.build`)."""

from __future__ import annotations

import logging
import secrets
from typing import Any

from ray.serve import Application
from ray.serve.exceptions import RayServeException

from ...cluster.spec.deployment import Deployment
from ...cluster.spec.spec import Spec, parse_spec
from ...proto.errors import MoesaicError, SpecError
from ..router_service.service_actor import service_address, start_router_service
from ..runtime.log_settings import log_settings
from ..runtime.ray_border import namespace_of, ray_address
from ..runtime.ray_token import need_token
from .applying import as_served, carry_out, known_deployment, plan_change
from .beginning import begin, first_deployment, prepare, runs
from .deploy import ingress_app, note_ingress, place_endpoint
from .ending import end_cluster
from .serve_border import ServeAddress, app_name, end_apps, find_serve, serve_address
from .trunk_apps import deploy_trunks

log = logging.getLogger(__name__)

WHO = "serve"


def built(values: dict[str, Any]) -> Application:
    """Return the ingress of the cluster that ``values`` describe, after it has begun.

    Raises RayServeException: of other errors Serve shows a traceback, and it tries again.
    """
    try:
        log_settings()
        spec = parse_spec(values, source="args")
        if spec.endpoint is None:
            raise SpecError("args: endpoint: null, but Ray Serve serves the endpoint; leave it out")
        need_token(ray_address(), insecure=spec.ray.insecure)
        place = serve_address(app_name(spec))
        spec = as_served(spec, place.host, place.port)
        deployment = _changed(spec, place) if runs(spec) else _begun(spec, place)
        note_ingress(deployment)
        return ingress_app(deployment)
    except MoesaicError as error:
        log.error("%s", error)
        raise RayServeException(str(error)) from error


def _begun(spec: Spec, place: ServeAddress) -> Deployment:
    models = prepare(spec, _unseen, log.warning, local=False)
    namespace = namespace_of(spec.name)
    endpoint, router = place_endpoint(spec, place), service_address(spec)
    deployment = first_deployment(secrets.token_hex(8), spec, models, endpoint, router)
    # What a cluster has left whose controller was killed has its secret.
    if (running := find_serve()) is not None:
        end_apps([app for app in running.of(namespace) if app != app_name(spec)])
    begun = False

    def has_begun() -> None:
        nonlocal begun
        begun = True

    try:
        begin(deployment, begun=has_begun)
        deploy_trunks(deployment, deployment.names)
        if deployment.router is not None:
            start_router_service(deployment)
    except BaseException:
        if begun:
            # Serve tells why its application failed as long as that is there.
            end_cluster(spec.name, None, keep=[app_name(spec)])
        raise
    return deployment


def _changed(spec: Spec, place: ServeAddress) -> Deployment:
    before = known_deployment(namespace_of(spec.name))
    change = plan_change(before, spec, _unseen, log.warning, served_at=place.url)
    carry_out(change, WHO, _unseen)
    return change.after


def _unseen(step: str, done: int, total: int) -> None:
    """Show no progress: Serve logs the result alone."""
