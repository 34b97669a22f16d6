"""What a host says of itself to the controller and to operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...cluster.placement import HostEntry, LayerKey, ModelRef, ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopStats:
    calls: int
    rows: int
    choices: int  # rows, and for each of them its experts
    batches: int
    refused: int
    queued_rows: int
    busy_s: float
    routers: int
    # Of an emulated device: batches whose arithmetic took longer than the device would have, by
    # how much at most, and by how much its answers came late in all.
    overruns: int = 0
    worst_overrun_s: float = 0.0
    late_s: float = 0.0


# A model and how it is placed; hosts remember it for a controller that starts anew.
PlacedModel = tuple[ModelRef, ModelShape]


# Incarnation, changes of what is held, loaded and known, and batches computed.
Revision = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReport:
    """What a host says of itself to the controller and to `status`."""

    entry: HostEntry
    revision: Revision  # another one when anything but memory and queues has changed
    pid: int
    device: str
    holdings: Mapping[LayerKey, list[int]]
    models: Sequence[PlacedModel]
    loading: int  # experts still to be loaded
    weight_bytes: int
    rss_bytes: int
    loop: LoopStats

    def describe(self) -> dict[str, Any]:
        """Plain values for people and JSON."""
        return {
            "incarnation": self.entry.incarnation,
            "node": self.entry.node,
            "pid": self.pid,
            "device": self.device,
            "experts": sum(map(len, self.holdings.values())),
            "loading": self.loading,
            "weight_bytes": self.weight_bytes,
            "rss_bytes": self.rss_bytes,
            **asdict(self.loop),
        }
