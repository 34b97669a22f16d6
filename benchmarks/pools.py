"""What benchmarks of a running pool share: a tiny model, and an engine over the pool."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import MixtralConfig, MixtralForCausalLM

from moesaic.actors.engine.engine import Engine, EngineConfig
from moesaic.actors.router.pool_link import TrunkConfig
from moesaic.actors.runtime.ray_border import namespace_of
from moesaic.actors.trunk.trunk import engine_factory
from moesaic.cluster.placement import ModelRef
from moesaic.cluster.spec.spec import parse_spec
from moesaic.models.source import resolve_model

HIDDEN, INTERMEDIATE = 32, 32
# Of one expert of the tiny model.
EXPERT_BYTES = 3 * HIDDEN * INTERMEDIATE * 4


def save_tiny_model(folder: Path, *, layers: int, experts: int, top_k: int) -> None:
    """Random weights: only their form matters, and that it is small."""
    config = MixtralConfig(
        vocab_size=16,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
    )
    MixtralForCausalLM(config).save_pretrained(folder)


@contextmanager
def engine_over(spec: dict[str, Any], *, streams: int) -> Iterator[Engine]:
    """An engine in this process, over the first model of the running cluster of ``spec``: as a
    trunk of the endpoint has it, so that rows that are lost end their requests alone."""
    parsed = parse_spec(spec)
    model = parsed.models[0]
    config = TrunkConfig(
        namespace=namespace_of(parsed.name),
        model=ModelRef(name=model.name, dtype=model.dtype, path=str(resolve_model(model.path))),
        name="benchmark",
        policy=parsed.router_policy,
        lending=parsed.lends,
        engine=EngineConfig(num_blocks=256, max_requests=max(32, streams)),
    )
    engine = engine_factory(config)()
    try:
        engine.start()
        yield engine
    finally:
        engine.close()
