"""vLLM's engine as far as it can be tested without vLLM."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from moesaic.actors.engine.engine import EngineConfig
from moesaic.actors.engine.trunk_config import TrunkConfig
from moesaic.actors.engine.vllm_backend.engine import VllmEngine
from moesaic.cluster.card_memory import CONTEXT_BYTES, LEAST_WORKSPACE_BYTES, CardShare
from moesaic.cluster.placement import ModelRef
from moesaic.models.trunk.describe import describe
from moesaic.models.trunk.trunk import meta_model
from moesaic.proto.errors import ClusterError, EngineError
from tests.helpers.cluster.fake_clock import FakeClock
from tests.helpers.models.tiny import tiny_mixtral


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


# ---- its part of a GPU --------------------------------------------------------------------------

TOTAL = 10**9
Given = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("vllm")
    tiny_mixtral().save_pretrained(made)
    return made


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    """What vLLM's engine was given, on a GPU; both are played."""
    found: Given = {}
    arguments, engines = ModuleType("arg_utils"), ModuleType("llm_engine")
    setattr(arguments, "EngineArgs", lambda **asked: found.update(asked))  # noqa: B010
    setattr(engines, "LLMEngine", SimpleNamespace(from_engine_args=lambda _: None))  # noqa: B010
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", arguments)
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.llm_engine", engines)
    properties = SimpleNamespace(total_memory=TOTAL, uuid="a")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (TOTAL - 10**6, TOTAL))
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda part, number: found.update(torchs_part=part),
    )
    return found


def build(folder: Path, share: CardShare, *, blocks: int | None = 8, device: str = "cuda") -> None:
    config = TrunkConfig(
        namespace="n",
        model=ModelRef(name="m", dtype="float32", path=str(folder)),
        name="t",
        device=device,
        engine=EngineConfig(num_blocks=blocks, page_size=32),
        share=share,
    )
    engine = VllmEngine(config)
    engine._build(engine._part_of_card(meta_model(tiny_mixtral().config)))


def test_vllm_gets_the_part_of_the_gpu_that_the_spec_gives_its_trunk(
    folder: Path, given: Given
) -> None:
    build(folder, CardShare(key="trunk", num_gpus=0.3))
    assert given["gpu_memory_utilization"] == 0.3
    build(folder, CardShare(key="trunk", num_gpus=0.3, gpu_memory=7 * 10**8))
    assert given["gpu_memory_utilization"] == 0.7
    assert given["torchs_part"] == pytest.approx(0.7 - CONTEXT_BYTES / TOTAL)


def test_vllm_without_a_limit_leaves_to_hosts_what_it_does_not_need(
    folder: Path, given: Given
) -> None:
    build(folder, CardShare(key="trunk", num_gpus=1))
    sizes = describe(folder, torch.float32)
    needs = sizes.trunk_bytes + 8 * 32 * sizes.cache_token_bytes
    needs += CONTEXT_BYTES + LEAST_WORKSPACE_BYTES
    assert given["gpu_memory_utilization"] == needs / TOTAL < 0.9
    assert "torchs_part" not in given


def test_vllm_that_chooses_its_own_cache_and_vllm_on_a_cpu_have_its_default(
    folder: Path, given: Given
) -> None:
    build(folder, CardShare(key="trunk"), blocks=None)
    build(folder, CardShare(key="trunk", num_gpus=0.3), device="cpu")
    assert "seed" in given
    assert "gpu_memory_utilization" not in given


def test_vllm_is_not_started_where_its_weights_do_not_fit(folder: Path, given: Given) -> None:
    with pytest.raises(ClusterError, match=r"trunk\.gpu_memory: 0\.0 GB, but the trunk's weights"):
        build(folder, CardShare(key="trunk", gpu_memory=1000))
    with pytest.raises(ClusterError, match=r"trunk\.device: .* need .* 1\.0 GB free of 1\.0 GB"):
        build(folder, CardShare(key="trunk"), blocks=10**6)
    assert given == {}
