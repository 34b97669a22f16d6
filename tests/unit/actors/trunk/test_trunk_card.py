"""A trunk's part of its card is checked before its weights are read; the card is played."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moesaic.actors.engine.engine import EngineConfig
from moesaic.actors.engine.trunk_config import TrunkConfig
from moesaic.actors.runtime.devices import take_for_trunk
from moesaic.actors.trunk import trunk
from moesaic.cluster.card_memory import CONTEXT_BYTES, CardShare
from moesaic.cluster.placement import ModelRef
from moesaic.models.trunk.describe import describe
from moesaic.proto.errors import ClusterError
from tests.helpers.models.tiny import tiny_mixtral

TOTAL = 10**9
FREE = 8 * 10**8
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def torchs_parts(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The parts of the card that PyTorch was allowed."""
    told: list[float] = []
    properties = SimpleNamespace(total_memory=TOTAL, uuid="a")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (FREE, TOTAL))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda part, number: told.append(part)
    )
    return told


def test_pytorch_has_the_limit_without_the_context(torchs_parts: list[float]) -> None:
    limit = 7 * 10**8
    assert take_for_trunk(DEVICE, CardShare(key="trunk", gpu_memory=limit), 10**7) == limit
    # What is needed for certain is not kept from it by an estimate.
    assert take_for_trunk(DEVICE, CardShare(key="trunk", gpu_memory=limit), limit) == limit
    assert torchs_parts == [(limit - CONTEXT_BYTES) / TOTAL, limit / TOTAL]


def test_a_trunk_without_a_limit_needs_what_is_free(torchs_parts: list[float]) -> None:
    assert take_for_trunk(DEVICE, CardShare(key="trunk", num_gpus=1), FREE) is None
    assert torchs_parts == []
    with pytest.raises(ClusterError, match=r"^trunk\.device: .* has 0\.8 GB free of 1\.0 GB"):
        take_for_trunk(DEVICE, CardShare(key="trunk", num_gpus=1), FREE + 1)
    with pytest.raises(ClusterError, match=r"^trunk\.num_gpus: 0\.5 GB, but the trunk's"):
        take_for_trunk(DEVICE, CardShare(key="trunk", num_gpus=0.5), TOTAL // 2 + 1)


def test_a_trunk_that_does_not_fit_reads_no_weights(
    tmp_path: Path, torchs_parts: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_mixtral().save_pretrained(tmp_path)
    sizes = describe(tmp_path, torch.float32)
    read: list[torch.device] = []

    class ReadError(Exception):
        """In the place of reading."""

    def load(path: Path, *, dtype: torch.dtype, device: torch.device) -> None:
        read.append(device)
        raise ReadError

    monkeypatch.setattr(trunk, "load_trunk", load)

    def opened(limit: int, blocks: int) -> None:
        config = TrunkConfig(
            namespace="n",
            model=ModelRef(name="m", dtype="float32", path=str(tmp_path)),
            name="t",
            device="cuda",
            engine=EngineConfig(num_blocks=blocks, page_size=32),
            share=CardShare(key="trunk", gpu_memory=limit),
        )
        trunk.open_trunk(config)

    needed = sizes.trunk_bytes + 4 * 32 * sizes.cache_token_bytes
    for limit, blocks in ((needed - 1, 4), (needed, 5)):
        with pytest.raises(ClusterError, match=r"trunk\.gpu_memory"):
            opened(limit, blocks)
    assert read == []
    with pytest.raises(ReadError):
        opened(needed, 4)
    assert read == [torch.device("cuda")]
