"""Which transport reaches which host, from where the two are and what was lost."""

from __future__ import annotations

import pytest

from moesaic.cluster.placement import HostEntry
from moesaic.cluster.routing.transports import PAUSE_S, Transport, TransportChoice, Transports


def entry(node: str = "a", device: str = "cpu", incarnation: int = 1) -> HostEntry:
    return HostEntry(
        host="h",
        incarnation=incarnation,
        node=node,
        shm_address="",
        grpc_address="",
        device=device,
    )


@pytest.mark.parametrize(
    ("choice", "node", "device", "mine", "best"),
    [
        ("auto", "a", "cpu", "cpu", "shm"),
        ("auto", "a", "GPU-1", "GPU-1", "shm"),
        ("auto", "b", "cpu", "cpu", "grpc"),
        ("auto", "b", "GPU-1", "GPU-2", "grpc"),
        ("device", "a", "GPU-1", "GPU-1", "cuda"),
        ("device", "a", "GPU-1", "GPU-2", "cuda"),
        ("device", "a", "GPU-1", "cpu", "shm"),
        ("device", "b", "cpu", "cpu", "grpc"),
        ("device", "b", "GPU-1", "GPU-2", "nccl"),
        ("device", "b", "cpu", "GPU-2", "grpc"),
        ("group", "a", "cpu", "cpu", "gloo"),
        ("group", "b", "GPU-1", "cpu", "gloo"),
        ("group", "b", "GPU-1", "GPU-2", "nccl"),
        ("group", "a", "GPU-1", "GPU-1", "gloo"),
        ("shm", "b", "GPU-1", "GPU-2", "shm"),
        ("grpc", "a", "GPU-1", "GPU-1", "grpc"),
    ],
)
def test_the_best_for_each_host(
    choice: TransportChoice, node: str, device: str, mine: str, best: Transport
) -> None:
    chosen = Transports(choice, node="a", device=mine)
    assert chosen.choose(entry(node, device), 0.0) == best


@pytest.mark.parametrize(
    ("choice", "device", "fallback"),
    [
        ("group", "cpu", "grpc"),
        ("device", "GPU-1", "shm"),
        ("auto", "cpu", "shm"),
        ("grpc", "cpu", "grpc"),
    ],
)
def test_what_was_lost_rests(choice: TransportChoice, device: str, fallback: Transport) -> None:
    host, chosen = entry(device=device), Transports(choice, node="a", device=device)
    best = chosen.choose(host, 0.0)
    chosen.lost(host, best, 10.0)
    assert chosen.choose(host, 10.0) == fallback
    # The loss of the fallback neither lengthens the pause nor bars it.
    chosen.lost(host, fallback, 20.0)
    assert chosen.choose(host, 9.9 + PAUSE_S) == fallback
    assert chosen.choose(host, 10.0 + PAUSE_S) == best
    chosen.lost(host, best, 50.0)
    assert chosen.choose(entry(device=device, incarnation=2), 50.0) == best
