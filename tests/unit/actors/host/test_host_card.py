"""A host's part of its card; PyTorch's functions are played."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moesaic.actors.host.device import HostCard
from moesaic.cluster.card_memory import CardShare, HostRoom
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
