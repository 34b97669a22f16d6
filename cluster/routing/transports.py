"""Choose the transport from a router to each host, and the fallback when one is lost.

`path_to` says why calls to a host are sent at all, instead of computed with its memory.
"""

from __future__ import annotations

from typing import Literal

from ..load.meter import HostPath
from ..placement import HostEntry

# `device`: transports that keep tensors on GPUs, between two GPUs; else the same as `auto`.
TransportChoice = Literal["auto", "shm", "grpc", "group", "device"]
# `cuda` is device memory on one node; `gloo` and `nccl` are groups of torch.distributed.
Transport = Literal["shm", "cuda", "grpc", "gloo", "nccl"]
CPU = "cpu"
# For how long the fallback is used to a host, counted from the last loss.
PAUSE_S = 30.0
_FALLBACK: dict[Transport, Transport] = {"cuda": "shm", "gloo": "grpc", "nccl": "grpc"}


def groups_of(choice: TransportChoice, device: str) -> frozenset[Transport]:
    """Return the torch.distributed backends that a host on ``device`` must offer groups for.

    These are the ones that the `Transports` of some router may choose under ``choice``.
    """
    on_cuda = device != CPU
    if choice == "group":
        return frozenset({"gloo", "nccl"} if on_cuda else {"gloo"})
    return frozenset({"nccl"} if choice == "device" and on_cuda else ())


class Transports:
    """One router's choice of transport for each host.

    Shared memory and gRPC are always available. Another transport that was lost on a host is not
    used there for `PAUSE_S`; a new incarnation of the host starts without that history.
    """

    def __init__(self, choice: TransportChoice, *, node: str, device: str = CPU) -> None:
        """Choose for a router on ``node``, whose own ``device`` is as in `HostEntry.device`."""
        self._choice: TransportChoice = choice
        self._node = node
        self._device = device
        self._lost_at: dict[tuple[str, int, Transport], float] = {}

    def choose(self, entry: HostEntry, now: float) -> Transport:
        best = self._best(entry)
        lost_at = self._lost_at.get((entry.host, entry.incarnation, best))
        if lost_at is not None and now < lost_at + PAUSE_S:
            return _FALLBACK[best]
        return best

    def lost(self, entry: HostEntry, transport: Transport, now: float) -> None:
        """Note that a connection failed to be made, or ended and this side did not end it."""
        if transport in _FALLBACK:
            # Losses of older incarnations do not matter any more.
            for key in [key for key in self._lost_at if key[0] == entry.host]:
                if key[1] != entry.incarnation:
                    del self._lost_at[key]
            self._lost_at[entry.host, entry.incarnation, transport] = now

    def _best(self, entry: HostEntry) -> Transport:
        both_cuda = CPU not in (entry.device, self._device)
        if self._choice == "group":
            # NCCL does not support two ranks on one GPU.
            return "nccl" if both_cuda and entry.device != self._device else "gloo"
        if self._choice in ("shm", "grpc"):
            return self._choice
        near = entry.node == self._node
        if self._choice == "device" and both_cuda:
            return "cuda" if near else "nccl"
        return "shm" if near else "grpc"


def is_near(entry: HostEntry, numa: int | None) -> bool:
    """Return whether a router pinned to the NUMA node ``numa`` (None: to none) may borrow.

    Another NUMA node's memory is slow, so a host that is pinned there computes for itself.
    """
    return None in (entry.numa, numa) or entry.numa == numa


def path_to(
    entry: HostEntry,
    *,
    transport: Transport | None,
    lent: bool,
    borrows: bool,
    node: str,
    device: str = CPU,
    numa: int | None = None,
) -> HostPath:
    """Return the path to a host; ``borrows``: the router asks hosts on its ``node`` to lend.

    ``device`` is where the router's tensors are, and ``numa`` what it is pinned to, as in
    `HostEntry`.
    """
    why = None
    if not lent:
        if not borrows:
            why = "this router borrows nothing (see network.lending)"
        elif entry.node != node:
            why = "it is on another machine"
        elif entry.device != device:
            why = f"it computes on {_named(entry.device)}, this router on {_named(device)}"
        elif not is_near(entry, numa):
            why = f"it is pinned to NUMA node {entry.numa}, and this router to node {numa}"
        elif transport not in (None, "shm", "cuda"):
            why = "its connection cannot carry memory"
        else:
            why = "it has lent nothing: hosts[].lending, an emulated device, or no expert yet"
    return HostPath(host=entry.host, transport=transport, lent=lent, why_sent=why)


def _named(device: str) -> str:
    return "the CPU" if device == CPU else device
