"""An engine over a running pool, for benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moesaic.actors.engine.engine import Engine, EngineConfig
from moesaic.actors.engine.trunk_config import TrunkConfig
from moesaic.actors.runtime.ray_border import namespace_of
from moesaic.actors.trunk.trunk import open_engine
from moesaic.cluster.placement import ModelRef
from moesaic.cluster.spec.spec import parse_spec
from moesaic.models.source import resolve_model


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
        device=parsed.trunk.device,
        engine=EngineConfig(num_blocks=256, max_requests=max(32, streams)),
    )
    engine = open_engine(config)
    try:
        engine.start()
        yield engine
    finally:
        engine.close()
