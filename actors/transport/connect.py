"""Which transport reaches a host."""

from __future__ import annotations

from typing import Literal

from ...cluster.placement import HostEntry
from .base import Channel
from .shm import ShmChannel

TransportChoice = Literal["auto", "shm", "grpc"]
SLOT_BYTES = 8 << 20


def connect(
    entry: HostEntry, *, router: str, node: str, choice: TransportChoice, slots: int
) -> Channel:
    """A channel to ``entry``: shared memory on one node, gRPC to others, or as ``choice`` says.

    Does not wait for the host. Raises HostLost.
    """
    shared = entry.node == node if choice == "auto" else choice == "shm"
    if shared:
        return ShmChannel(
            entry.host, entry.shm_address, router=router, slots=slots, slot_bytes=SLOT_BYTES
        )
    from .grpc_stream import GrpcChannel

    return GrpcChannel(entry.host, entry.grpc_address, router=router)
