"""A host's part of its card; PyTorch's functions are played, but for a card where one is."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from moesaic.actors.host.device import HostCard
from moesaic.actors.runtime.devices import visible_cards
from moesaic.cluster.card_memory import CardShare, HostRoom
from moesaic.kernels.slabs.device_memory import DeviceMemory
from moesaic.proto.errors import ClusterError

TOTAL = 100 * 10**9
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def torchs_parts(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The parts of the card that PyTorch was allowed."""
    told: list[float] = []
    properties = SimpleNamespace(total_memory=TOTAL, uuid="a")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda part, number: told.append(part)
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, TOTAL))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5)
    return told


def test_experts_and_pytorch_stay_within_the_limit(torchs_parts: list[float]) -> None:
    card = HostCard(DEVICE, CardShare(key="hosts.0", num_gpus=0.3))
    room = HostRoom.within(TOTAL * 3 // 10)
    assert card.budget.limit_bytes == room.mapped_bytes
    assert torchs_parts == [room.workspace_bytes / TOTAL]
    card.budget.take(11)
    said = card.report()
    assert (said.total_bytes, said.free_bytes, said.used_bytes) == (TOTAL, 7, 16)
    assert (said.limit_bytes, said.room_bytes) == (TOTAL * 3 // 10, room.expert_bytes)


def test_a_host_without_a_limit_takes_what_it_needs(torchs_parts: list[float]) -> None:
    card = HostCard(DEVICE, CardShare(key="hosts.0", num_gpus=1))
    assert (card.budget.limit_bytes, torchs_parts) == (None, [])
    said = card.report()
    assert (said.limit_bytes, said.room_bytes) == (None, None)


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (CardShare(key="hosts.1", gpu_memory=10**9), r"hosts\.1\.gpu_memory: 1\.0 GB have no room"),
        (CardShare(key="hosts.1", num_gpus=0.01), r"hosts\.1\.num_gpus: 1\.0 GB have no room"),
        (CardShare(key="hosts.1", gpu_memory=2 * TOTAL), r"gpu_memory: 200\.0 GB, but cuda:0 has"),
    ],
)
def test_a_limit_that_cannot_hold_is_named_at_the_start(
    limit: CardShare, words: str, torchs_parts: list[float]
) -> None:
    with pytest.raises(ClusterError, match=words):
        HostCard(DEVICE, limit)
    assert torchs_parts == []


@pytest.mark.cuda
def test_a_card_refuses_what_exceeds_its_parts() -> None:
    limit = 3 * 10**9
    before = visible_cards()[0]
    assert before.total_bytes == torch.cuda.get_device_properties(DEVICE).total_memory
    assert before.free_bytes is not None
    assert limit < before.free_bytes <= before.total_bytes
    torch.cuda.empty_cache()
    card = HostCard(DEVICE, CardShare(key="hosts.0", gpu_memory=limit))
    memory = card.budget.bound(partial(DeviceMemory, DEVICE))(limit)
    try:
        chunks = HostRoom.within(limit).mapped_bytes // memory.chunk_bytes
        for chunk in range(chunks):
            memory.map(chunk)
        with pytest.raises(torch.OutOfMemoryError, match=r"hosts\.0\.gpu_memory leaves"):
            memory.map(chunks)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(
                HostRoom.within(limit).workspace_bytes + 1, dtype=torch.uint8, device=DEVICE
            )
        said = card.report()
        assert chunks * memory.chunk_bytes <= said.used_bytes <= limit
        free = visible_cards()[0].free_bytes
        assert free is not None
        assert free <= before.free_bytes - chunks * memory.chunk_bytes
    finally:
        memory.close()
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
