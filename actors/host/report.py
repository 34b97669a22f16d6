"""What a host reports about itself to the controller and to operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...cluster.expert_keys import LayerKey
from ...cluster.placement import HostEntry, ModelRef, ModelShape
from ...cluster.reports.status import HostProcess


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopStats:
    calls: int
    rows: int
    assignments: int  # each row counts once for each of its experts
    batches: int
    refused: int
    queued_rows: int
    busy_s: float
    routers: int
    backward_s: float = 0.0  # of backward calls, with what is added up after their answers
    received_bytes: int = 0  # of the tensors of calls
    sent_bytes: int = 0
    # For an emulated device: batches whose arithmetic took longer than the emulated time, the
    # largest such excess, and the sum of the delays of all answers.
    overruns: int = 0
    worst_overrun_s: float = 0.0
    late_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CardReport:
    """The memory of a host's card (GPU), in bytes."""

    total_bytes: int
    free_bytes: int
    used_bytes: int  # by this host, besides its CUDA context
    limit_bytes: int | None  # what this host may take; None: no limit
    room_bytes: int | None  # of that, for experts


# A model and how it is placed. Hosts remember it for a restarted controller.
PlacedModel = tuple[ModelRef, ModelShape]


# (incarnation, count of changes to experts, loading and models, count of batches computed)
Revision = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReport:
    """The state of one host, for the controller and for `status`."""

    entry: HostEntry
    revision: Revision  # differs whenever anything but memory use and queues has changed
    pid: int
    device: str
    holdings: Mapping[LayerKey, Mapping[int, tuple[int, ...]]]  # experts, with their versions
    models: Sequence[PlacedModel]
    loading: int  # experts still to be loaded
    weight_bytes: int
    rss_bytes: int
    loop: LoopStats
    machine_bytes: tuple[int, int] = (0, 0)  # of its machine: all memory, and what is free of it
    adopted: int = 0  # experts that this process has from its predecessor's memory
    card: CardReport | None = None  # None: it computes on the CPU
    run: int = 0  # the training run that it knows; 0: none
    owned: int = 0  # keys that it owns for that run
    owner_s: float = 0.0  # in which it has summed up and applied gradients of what it owns

    @property
    def free_bytes(self) -> int | None:
        """What is free where its experts lie, as far as it may take that; None: unknown."""
        if self.card is None:
            return self.machine_bytes[1] if self.machine_bytes[0] else None
        limit = self.card.limit_bytes
        left = self.card.free_bytes if limit is None else limit - self.card.used_bytes
        return max(0, min(left, self.card.free_bytes))

    @property
    def work(self) -> tuple[int, int, float, float, float]:
        """What its device has done, as `cluster.control.host_speed.Work` names it."""
        loop = self.loop
        return loop.batches, loop.assignments, loop.busy_s, loop.backward_s, self.owner_s

    def process(self) -> HostProcess:
        """Return what `status` shows of the host's process."""
        loop = self.loop
        return HostProcess(
            incarnation=self.entry.incarnation,
            node=self.entry.node,
            pid=self.pid,
            device=self.device,
            replicas=sum(map(len, self.holdings.values())),
            loading_replicas=self.loading,
            weight_bytes=self.weight_bytes,
            rss_bytes=self.rss_bytes,
            adopted_replicas=self.adopted,
            card_used_bytes=None if self.card is None else self.card.used_bytes,
            card_limit_bytes=None if self.card is None else self.card.limit_bytes,
            calls=loop.calls,
            rows=loop.rows,
            assignments=loop.assignments,
            batches=loop.batches,
            refused_calls=loop.refused,
            queued_rows=loop.queued_rows,
            busy_s=loop.busy_s,
            connected_routers=loop.routers,
            received_bytes=loop.received_bytes,
            sent_bytes=loop.sent_bytes,
            overrun_batches=loop.overruns,
            worst_overrun_s=loop.worst_overrun_s,
            total_late_s=loop.late_s,
        )
