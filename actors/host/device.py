"""A host's device: work done, busy seconds, emulated time, and its memory if it is a GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import torch

from ...cluster.card_memory import CardShare, HostRoom, too_small_for_a_host
from ...cluster.host.emulation import Emulation
from ...cluster.host.residency import QueuedCall
from ...kernels.slabs.bounded_memory import MemoryBudget
from ...proto.errors import ClusterError
from ...proto.wire import CallLayout
from ..runtime.devices import card_limit, limit_torch
from .report import CardReport, LoopStats

# Linux wakes a sleeping thread about 50 us late, and much later on a busy core. So the last part
# of a wait yields the core in a loop instead of sleeping.
_FINE_S = 200e-6


class Device:
    """Counts batches and their seconds; an emulated device also delays each batch's answers.

    The delay lasts until the emulated device would be done. The loop's thread sleeps for so long,
    because the device counts as busy.
    """

    def __init__(
        self, emulation: Emulation | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._emulation = emulation
        self._clock = clock
        self._calls = self._rows = self._assignments = self._batches = self._overruns = 0
        self._received_bytes = self._sent_bytes = 0
        self._busy_s = self._backward_s = self._worst_overrun_s = self._late_s = 0.0

    def emulate(self, emulation: Emulation | None) -> None:
        """Emulate another device from the next batch on."""
        self._emulation = emulation

    def finish(self, batch: Sequence[QueuedCall], began: float) -> float:
        """Count a computed batch that began at ``began``, and return its seconds on the device.

        With an emulated device, this sleeps until those seconds are over. A backward call goes on
        after its answer (`add_up`).
        """
        busy_s = self._clock() - began
        if self._emulation is not None:
            busy_s = self._emulate(self._emulation.batch_s([q.ids for q in batch]), began, busy_s)
        self._batches += 1
        self._calls += len(batch)
        self._rows += sum(queued.rows for queued in batch)
        self._assignments += sum(int((queued.ids >= 0).sum()) for queued in batch)
        self._busy_s += busy_s
        if batch[0].backward:
            self._backward_s += busy_s
        return busy_s

    def add_up(self, work: Callable[[], None]) -> None:
        """Do the rest of a backward call, and count its time."""
        began = self._clock()
        work()
        self._backward_s += self._clock() - began

    def answers(self, layout: CallLayout) -> None:
        """Count the tensors of a call whose answer is about to be sent."""
        self._received_bytes += layout.call_bytes
        self._sent_bytes += layout.reply_bytes

    def stats(self, *, refused: int, queued_rows: int, routers: int) -> LoopStats:
        return LoopStats(
            calls=self._calls,
            rows=self._rows,
            assignments=self._assignments,
            batches=self._batches,
            refused=refused,
            queued_rows=queued_rows,
            busy_s=self._busy_s,
            backward_s=self._backward_s,
            routers=routers,
            received_bytes=self._received_bytes,
            sent_bytes=self._sent_bytes,
            overruns=self._overruns,
            worst_overrun_s=self._worst_overrun_s,
            late_s=self._late_s,
        )

    def _emulate(self, emulated_s: float, began: float, computed_s: float) -> float:
        excess_s = computed_s - emulated_s
        if excess_s > 0:
            self._overruns += 1
            self._worst_overrun_s = max(self._worst_overrun_s, excess_s)
        else:
            self._wait_until(began + emulated_s)
        self._late_s += self._clock() - began - emulated_s
        return max(computed_s, emulated_s)

    def _wait_until(self, end: float) -> None:
        while (left_s := end - self._clock()) > 0:
            if left_s > _FINE_S:
                time.sleep(left_s - _FINE_S)
            else:
                os.sched_yield()


class HostCard:
    """A host's part of its card (GPU): PyTorch and the host's experts are kept within it."""

    def __init__(self, device: torch.device, share: CardShare) -> None:
        """Set the limits of this process. Raises ClusterError if experts would have no room."""
        self._device = device
        self._limit_bytes = card_limit(device, share)
        self._room: HostRoom | None = None
        self.budget = MemoryBudget()
        if self._limit_bytes is None:
            return
        self._room = room = HostRoom.within(self._limit_bytes, trains=share.trains)
        if room.expert_bytes == 0:
            raise ClusterError(f"{share.limited_by}: {too_small_for_a_host(self._limit_bytes)}")
        self.budget = MemoryBudget(room.mapped_bytes, share.limited_by)
        limit_torch(device, room.workspace_bytes)

    def report(self) -> CardReport:
        free, total = torch.cuda.mem_get_info(self._device)
        return CardReport(
            total_bytes=total,
            free_bytes=free,
            used_bytes=self.budget.used_bytes + torch.cuda.memory_reserved(self._device),
            limit_bytes=self._limit_bytes,
            room_bytes=None if self._room is None else self._room.expert_bytes,
        )
