"""Opens a connection to a host over any of the transports."""

from __future__ import annotations

from typing import Protocol

import torch

from ...cluster.placement import HostEntry
from ...cluster.routing.transports import Transport
from ...proto.keys import ClusterSecret, secret_of_process
from ..transport.base import Channel
from ..transport.shm import ShmChannel

# The tensors of one call and of its answer. Main memory is taken where a call was written, so large
# slots cost nothing; a GPU's is taken at once, for all calls that may be in flight.
SLOT_BYTES = 256 << 20
GPU_SLOT_BYTES = 64 << 20
_CPU = torch.device("cpu")


class Connect(Protocol):
    """Opens a connection to a host, as `connect` does."""

    def __call__(
        self,
        entry: HostEntry,
        transport: Transport,
        *,
        router: str,
        slots: int,
        secret: ClusterSecret | None = None,
        device: torch.device = _CPU,
        borrows: bool = False,
    ) -> Channel: ...


def connect(
    entry: HostEntry,
    transport: Transport,
    *,
    router: str,
    slots: int,
    secret: ClusterSecret | None = None,
    device: torch.device = _CPU,
    borrows: bool = False,
) -> Channel:
    """Return a channel to the host ``entry``, without waiting for the host.

    ``secret`` is the secret of the host's cluster (None: that of this process); ``device`` is the
    router's. With ``borrows`` the host may lend its experts' memory. Raises HostLost.
    """
    secret = secret or secret_of_process()
    if transport in ("shm", "cuda"):
        return ShmChannel(
            entry.host,
            entry.shm_address,
            router=router,
            slots=slots,
            slot_bytes=GPU_SLOT_BYTES if transport == "cuda" else SLOT_BYTES,
            proof=secret.proof("shm", entry.target),
            device=device if transport == "cuda" else None,
            borrows=borrows,
        )
    from ..transport.grpc.stream import GrpcChannel

    group = "" if transport == "grpc" else transport
    return GrpcChannel(
        entry.host,
        entry.grpc_address,
        router=router,
        group=group,
        device=device,
        proof=secret.proof("experts", entry.target),
    )
