"""vLLM's engine as far as it can be tested without vLLM."""

from __future__ import annotations

import pytest

from moesaic.actors.engine.engine import EngineConfig
from moesaic.actors.engine.vllm_backend.engine import VllmEngine
from moesaic.actors.router.trunk_config import TrunkConfig
from moesaic.cluster.placement import ModelRef
from moesaic.proto.errors import EngineError
from tests.helpers.cluster.fake_clock import FakeClock


def test_an_engine_that_makes_no_step_for_too_long_stands_still() -> None:
    clock = FakeClock()
    config = TrunkConfig(
        namespace="n",
        model=ModelRef(name="m", dtype="float32", path="/nowhere"),
        name="t",
        engine=EngineConfig(stall_timeout_s=30.0),
    )
    engine = VllmEngine(config, clock=clock)
    clock.now += 29.0
    engine._raise_if_stalled()
    clock.now += 1.0
    with pytest.raises(EngineError, match="no step for 30 s"):
        engine._raise_if_stalled()
