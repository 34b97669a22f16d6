"""Deploy the endpoint of a cluster: one trunk deployment per model, and the ingress."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from ...cluster.card_memory import CACHE_PAGE_TOKENS
from ...cluster.placement import ModelRef
from ...cluster.service.web_guard import is_loopback
from ...cluster.spec.monitoring import MonitoringSpec
from ...cluster.spec.spec import Spec
from ...proto.errors import ClusterError
from ..engine.engine import EngineConfig, ExpertBounds
from ..engine.trunk_config import TrunkConfig
from ..runtime.ray_border import actor_options, last_line, namespace_of
from ..store.start_failures import StartFailure, describe_failures
from ..trunk.engine_factory import EngineFactory
from .controller_link import ControllerMetrics, ControllerPage, ControllerStatus
from .serve_app import START_TIMEOUT_S, Trunk, build, ending_s
from .serve_border import (
    ServeAddress,
    app_name,
    find_address,
    find_monitoring,
    is_head_node,
    start_serve,
    wait_answers,
    wait_monitored,
)

T = TypeVar("T")


class Addresses(NamedTuple):
    """Where clients reach the endpoint and its monitoring.

    ``monitoring`` is None where this machine cannot reach it.
    """

    url: str
    monitoring: str | None


class Deployed(NamedTuple):
    """Where an endpoint and its monitoring will be: `wait_endpoint` waits until they are there."""

    place: ServeAddress
    watched: ServeAddress | None


def deploy_endpoint(
    spec: Spec, models: Mapping[str, ModelRef], experts: Mapping[str, ExpertBounds]
) -> Deployed:
    """Start to serve ``models`` over HTTP.

    Trunks read their weights while hosts do, and wait for the experts. ``experts`` bounds how many
    experts per token a request may ask for. Raises ClusterError; the caller then ends what had
    started with `leave_serve`.
    """
    endpoint = spec.endpoint
    assert endpoint is not None
    namespace = namespace_of(spec.name)
    threads = (os.cpu_count() or 1) if spec.trunk.threads == "auto" else spec.trunk.threads
    trunks = {}
    for name, ref in models.items():
        config = TrunkConfig(
            namespace=namespace,
            model=ref,
            name=f"trunk-{name}",
            device=spec.trunk.device,
            threads=threads,
            policy=spec.router_policy,
            transport=spec.network.transport,
            lending=spec.lends,
            engine=_engine_config(spec),
            engine_kind=spec.trunk.engine,
            start_s=spec.timeouts.start_s,
            share=spec.trunk.card_share("trunk"),
        )
        deployment = Trunk.options(
            name=f"Trunk-{name}",
            ray_actor_options=actor_options(spec.trunk, threads),
            graceful_shutdown_timeout_s=ending_s(endpoint.drain_s),
            **_replicas(spec),
        )
        trunks[name] = deployment.bind(EngineFactory(config))
    tokenizers = {name: _tokenizer(Path(ref.path or "")) for name, ref in models.items()}
    with _saying_why(spec):
        place, watched = find_address(spec), find_monitoring(spec)
        start_serve(place, spec.name)
        controller, at = ControllerStatus(namespace), spec.monitoring
        cold_start_s = spec.timeouts.start_s if spec.trunk.min_replicas == 0 else None
        app = build(
            trunks,
            tokenizers,
            status=controller,
            cold_start_s=cold_start_s,
            endpoint=endpoint,
            aliases={model.name: model.aliases for model in spec.models},
            experts=experts,
            monitoring=watched and MonitoringSpec(host=watched.host, port=watched.port),
            pool=at and ControllerMetrics(controller, spec.name, at.hot_experts),
            own_hosts=own_hosts(place, watched),
            page=ControllerPage(namespace),
        )
        target = serve.RunTarget(app, app_name(spec), place.prefix)
        serve.run_many([target], wait_for_applications_running=False)
    return Deployed(place, watched)


def wait_endpoint(spec: Spec, deployed: Deployed, models: Collection[str]) -> Addresses:
    """Wait until all models answer at the endpoint. Raises ClusterError if one does not start."""
    place, watched = deployed
    with _saying_why(spec):
        _wait_running(app_name(spec))
    wait_answers(place, list(models))
    if watched is None or (is_loopback(watched.host) and not is_head_node()):
        return Addresses(place.url, None)
    wait_monitored(watched, list(models))
    return Addresses(place.url, watched.url)


def _wait_running(app: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while (found := serve.status().applications.get(app)) is not None:
        if found.status == ApplicationStatus.RUNNING:
            return
        if found.status == ApplicationStatus.DEPLOY_FAILED:
            raise RuntimeError(found.message)
        if time.monotonic() > deadline:
            raise RuntimeError(f"its replicas did not start within {START_TIMEOUT_S:g} s")
        time.sleep(0.1)
    raise RuntimeError("it was deleted while it started")


@contextlib.contextmanager
def _saying_why(spec: Spec) -> Iterator[None]:
    """Raise an error of Ray or Serve as a ClusterError that names the part that failed."""
    try:
        yield
    except (RayError, RayServeException, RuntimeError, ValueError) as error:
        why = describe_failures(namespace_of(spec.name)) or _serves_words(spec) or str(error)
        raise ClusterError(f"endpoint: {why}") from error


def own_hosts(*places: ServeAddress | None) -> set[str]:
    """Return the hosts in the addresses that are printed and written to the session file."""
    return {urlsplit(place.url).hostname or "" for place in places if place is not None}


def _serves_words(spec: Spec) -> str:
    """Return Serve's message for the first deployment that failed, or "".

    A process that was killed cannot report why itself.
    """
    try:
        deployments = serve.status().applications[app_name(spec)].deployments
    except (RayError, RayServeException, RuntimeError, LookupError):
        return ""
    for name, one in sorted(deployments.items(), reverse=True):  # trunks before the ingress
        if "FAIL" in one.status:
            kind = "trunk" if name.startswith("Trunk-") else "ingress"
            words = last_line(RuntimeError(one.message))
            if "ActorDied" in words:
                words = f"its process was killed or ended by itself ({words.rstrip('()')})"
            return StartFailure(kind, name.removeprefix("Trunk-"), words).describe(spec.name)
    return ""


def _replicas(spec: Spec) -> dict[str, Any]:
    trunk, scale = spec.trunk, spec.autoscale
    if trunk.min_replicas == trunk.max_replicas:
        return {"num_replicas": trunk.max_replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=trunk.min_replicas,
            # One even where trunks may scale to zero: the ingress reads each trunk's limits first.
            initial_replicas=max(1, trunk.min_replicas),
            max_replicas=trunk.max_replicas,
            target_ongoing_requests=trunk.target_requests,
            upscale_delay_s=scale.up_after_s,
            downscale_delay_s=scale.down_after_s,
        )
    }


def _engine_config(spec: Spec) -> EngineConfig:
    page = CACHE_PAGE_TOKENS
    return EngineConfig(
        page_size=page,
        num_blocks=math.ceil(spec.trunk.cache_tokens / page),
        max_batch_tokens=spec.trunk.max_batch_tokens,
        max_requests=spec.trunk.max_requests,
        max_waiting=spec.trunk.max_waiting,
        compiled=spec.trunk.compiled,
        park_s=spec.timeouts.expert_s,
        # A step may wait for a slow host in several layers, one after the other.
        stall_timeout_s=2 * spec.timeouts.expert_s + 60.0,
    )


def _tokenizer(path: Path) -> Callable[[], Any]:
    def load() -> Any:
        from ...models.folder.tokenizer import read_tokenizer

        return read_tokenizer(path)

    return load
