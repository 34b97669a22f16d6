"""The trunks of each model as an application of Ray Serve, so that one changes without the others.

Serve lets replicas run on whose version stays. The version has all that a trunk's process takes
over when it starts.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig

from ...cluster.card_memory import CACHE_PAGE_TOKENS
from ...cluster.placement import ModelRef
from ...cluster.spec.deployment import Deployment, version_of
from ...cluster.spec.parts import EndpointSpec
from ...cluster.spec.spec import Spec
from ..engine.engine import EngineConfig
from ..engine.trunk_config import TrunkConfig
from ..runtime.ray_border import actor_options, namespace_of
from ..trunk.engine_factory import EngineFactory
from .replica.names import trunk_app, trunk_name
from .replica.trunk import Trunk, ending_s, versioned
from .serve_border import quiet_serve


def deploy_trunks(
    deployment: Deployment, models: Collection[str], there: Collection[str] = ()
) -> None:
    """Let Serve start, or change, the trunks of ``models``, and wait for none of them.

    What has not changed goes on. Trunks read their weights while hosts do, and wait for the
    experts. The models ``there`` have trunks already, whose number stays.
    """
    targets = [
        _target(deployment, one.ref, first=one.ref.name not in there)
        for one in deployment.models
        if one.ref.name in models
    ]
    if targets:
        quiet_serve()
        serve.run_many(targets, wait_for_applications_running=False)


def trunk_version(deployment: Deployment, ref: ModelRef) -> str:
    """Return a text that is another one if the trunks of a model have to be started anew."""
    # The time for the start says nothing of a trunk that has started.
    config = replace(_config(deployment, ref), start_s=0.0)
    options = _options(deployment)
    return version_of((deployment.id, config, options))


def _target(deployment: Deployment, ref: ModelRef, *, first: bool) -> serve.RunTarget:
    spec = deployment.spec
    wanted = Trunk.options(
        name=trunk_name(ref.name),
        ray_actor_options=_options(deployment),
        graceful_shutdown_timeout_s=ending_s((spec.endpoint or EndpointSpec()).drain_s),
        **_replicas(spec, first=first),
    )
    app = versioned(wanted, trunk_version(deployment, ref)).bind(
        EngineFactory(_config(deployment, ref))
    )
    return serve.RunTarget(app, trunk_app(namespace_of(spec.name), ref.name), None)


def _config(deployment: Deployment, ref: ModelRef) -> TrunkConfig:
    spec = deployment.spec
    return TrunkConfig(
        namespace=namespace_of(spec.name),
        model=ref,
        name=f"trunk-{ref.name}",
        device=spec.trunk.device,
        threads=deployment.trunk_threads,
        policy=spec.router_policy,
        transport=spec.network.transport,
        lending=spec.lends,
        engine=_engine_config(spec),
        engine_kind=spec.trunk.engine,
        start_s=spec.timeouts.start_s,
        share=spec.trunk.card_share("trunk"),
    )


def _options(deployment: Deployment) -> dict[str, Any]:
    logs = deployment.log_environment
    return actor_options(deployment.spec.trunk, deployment.trunk_threads, logs)


def _replicas(spec: Spec, *, first: bool) -> dict[str, Any]:
    trunk, scale = spec.trunk, spec.autoscale
    if trunk.min_replicas == trunk.max_replicas:
        return {"num_replicas": trunk.max_replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=trunk.min_replicas,
            # One even where trunks may scale to zero: the ingress reads each trunk's limits first.
            initial_replicas=max(1, trunk.min_replicas) if first else None,
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
