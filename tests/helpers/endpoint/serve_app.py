"""The endpoint's application on Ray Serve, with engines of a test's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moesaic.actors.serve.replica.ingress import ingress
from moesaic.actors.serve.replica.ingress_plan import IngressPlan, ModelPlan


@dataclass(frozen=True)
class FixedPlan:
    plan: IngressPlan

    def __call__(self) -> IngressPlan:
        return self.plan


def endpoint_app(
    trunks: Mapping[str, Any], tokenizers: Mapping[str, Callable[[], Any]], **more: Any
) -> Any:
    """Return the application; ``trunks`` maps models to bound deployments."""
    models = {
        name: ModelPlan(trunk=trunk, tokenizer=tokenizers[name]) for name, trunk in trunks.items()
    }
    return ingress(FixedPlan(IngressPlan(models=models, **more)), drain_s=30.0)
