"""Which transport a router uses to each host, and what it falls back to when one is lost."""

from __future__ import annotations

from typing import Literal

from ..placement import HostEntry

# `device`: between GPUs what does not leave them, else as `auto`, which keeps to what was tested.
TransportChoice = Literal["auto", "shm", "grpc", "group", "device"]
# `cuda` is device memory on one node; `gloo` and `nccl` are groups of torch.distributed.
Transport = Literal["shm", "cuda", "grpc", "gloo", "nccl"]
CPU = "cpu"
# For how long a host is reached by the fallback, counted from the last loss.
PAUSE_S = 30.0
_FALLBACK: dict[Transport, Transport] = {"cuda": "shm", "gloo": "grpc", "nccl": "grpc"}


def groups_of(choice: TransportChoice, device: str) -> frozenset[Transport]:
    """The backends of the groups that a host on ``device`` makes, where the spec says ``choice``:
    what some router's `Transports` may choose for it."""
    on_cuda = device != CPU
    if choice == "group":
        return frozenset({"gloo", "nccl"} if on_cuda else {"gloo"})
    return frozenset({"nccl"} if choice == "device" and on_cuda else ())


class Transports:
    """One router's choice. Shared memory and gRPC always do; what else was lost on a host is not
    used there for `PAUSE_S`. A host that starts anew begins without a past."""

    def __init__(self, choice: TransportChoice, *, node: str, device: str = CPU) -> None:
        """``device`` is the router's own, as in `HostEntry.device`."""
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
        """A connection ended that was not ended on this side, or was never made."""
        if transport in _FALLBACK:
            # What was lost on older incarnations does not matter any more.
            for key in [key for key in self._lost_at if key[0] == entry.host]:
                if key[1] != entry.incarnation:
                    del self._lost_at[key]
            self._lost_at[entry.host, entry.incarnation, transport] = now

    def _best(self, entry: HostEntry) -> Transport:
        both_cuda = CPU not in (entry.device, self._device)
        if self._choice == "group":
            # NCCL has no two ranks on one GPU.
            return "nccl" if both_cuda and entry.device != self._device else "gloo"
        if self._choice in ("shm", "grpc"):
            return self._choice
        near = entry.node == self._node
        if self._choice == "device" and both_cuda:
            return "cuda" if near else "nccl"
        return "shm" if near else "grpc"
