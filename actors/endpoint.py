"""The endpoint of a cluster: one trunk deployment for each model, and the ingress before them."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import RayServeException

from ..cluster.spec import Spec
from ..proto.errors import ClusterError, InternalError, NoAnswer, in_words
from .engine import EngineConfig, ExpertBounds
from .ray_border import CONTROLLER, actor_options, last_line, namespace_of
from .serve_app import QUESTION_TIMEOUT_S, Trunk, build, ending_s
from .serve_border import app_name, find_place, start_serve, wait_answers
from .start_failures import StartFailure, describe_failures
from .store import ModelRef
from .trunk import TrunkConfig, engine_factory

T = TypeVar("T")


def start_endpoint(
    spec: Spec, models: Mapping[str, ModelRef], experts: Mapping[str, ExpertBounds]
) -> str:
    """Serve ``models`` over HTTP, and wait until they answer there; gives the address.
    ``experts``: how many a request may ask for.

    Raises ClusterError; what had started is left to `leave_serve`.
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
            policy=spec.timeouts.policy,
            transport=spec.network.transport,
            engine=_engine_config(spec),
            engine_kind=spec.trunk.engine,
            start_s=spec.timeouts.start_s,
        )
        deployment = Trunk.options(
            name=f"Trunk-{name}",
            ray_actor_options=actor_options(spec.trunk, threads),
            graceful_shutdown_timeout_s=ending_s(endpoint.drain_s),
            **_replicas(spec),
        )
        trunks[name] = deployment.bind(engine_factory(config))
    tokenizers = {name: _tokenizer(Path(ref.path or "")) for name, ref in models.items()}
    try:
        place = find_place(spec)
        start_serve(place, spec.name)
        cold_start_s = spec.timeouts.start_s if spec.trunk.min_replicas == 0 else None
        status = _status_source(namespace)
        app = build(
            trunks,
            tokenizers,
            status=status,
            cold_start_s=cold_start_s,
            endpoint=endpoint,
            aliases={model.name: model.aliases for model in spec.models},
            experts=experts,
        )
        serve.run(app, name=app_name(spec), route_prefix=place.prefix, blocking=False)
    except (RayError, RayServeException, RuntimeError, ValueError) as error:
        why = describe_failures(namespace) or _serves_words(spec) or str(error)
        raise ClusterError(f"endpoint: {why}") from error
    wait_answers(place, list(models))
    return place.url


def _serves_words(spec: Spec) -> str:
    """What Serve says of the first part that failed: a process that was killed could not tell why
    itself."""
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
            # The ingress asks each trunk for its limits before it serves.
            initial_replicas=max(1, trunk.min_replicas),
            max_replicas=trunk.max_replicas,
            target_ongoing_requests=trunk.target_requests,
            upscale_delay_s=scale.up_after_s,
            downscale_delay_s=scale.down_after_s,
        )
    }


def _engine_config(spec: Spec) -> EngineConfig:
    page = 32
    return EngineConfig(
        page_size=page,
        num_blocks=math.ceil(spec.trunk.cache_tokens / page),
        max_batch_tokens=spec.trunk.max_batch_tokens,
        max_requests=spec.trunk.max_requests,
        max_waiting=spec.trunk.max_waiting,
        compiled=spec.trunk.compiled,
        park_s=spec.timeouts.expert_s,
        # A step may wait for a slow host in one layer after the other.
        stall_timeout_s=2 * spec.timeouts.expert_s + 60.0,
    )


def _tokenizer(path: Path) -> Callable[[], Any]:
    def load() -> Any:
        from ..models.tokenizer import read_tokenizer

        return read_tokenizer(path)

    return load


def _status_source(namespace: str) -> Callable[[], Any]:
    async def status() -> dict[str, Any]:
        try:
            controller: Any = ray.get_actor(CONTROLLER, namespace=namespace)
            return {"cluster": await answered(controller.status.remote())}
        except ValueError:
            raise NoAnswer("the controller is not there: it is being started anew") from None

    return status


async def answered(asked: Awaitable[T]) -> T:
    """What the controller answers. Raises NoAnswer where it takes too long or is restarted, and
    InternalError for a defect of it."""
    try:
        async with asyncio.timeout(QUESTION_TIMEOUT_S):
            return await asked
    except TimeoutError:
        raise NoAnswer(f"the controller did not answer within {QUESTION_TIMEOUT_S:g} s") from None
    except RayTaskError as error:
        raise InternalError(f"the controller: {in_words(error.cause)}") from error
    except RayError as error:
        raise NoAnswer(f"the controller is being started anew ({last_line(error)})") from error
