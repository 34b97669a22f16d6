"""Backward calls on a device, and the sums of experts' gradients there.

A call is copied to the device as a whole and its answer back, in pinned memory, and the host waits
for the device once. What is left to add is enqueued after the answer.

Shape suffixes: E = experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ...cluster.expert_keys import ExpertKey, LayerKey
from ...kernels.grouped.backward import PendingSlotGradients, SlotGradients
from ...kernels.grouped.slots import LayerSlots
from ...kernels.slabs.layer_arithmetic import DeviceLayer
from .compute import PendingCall
from .device_compute import PinnedMemory, on_device, wait_for
from .weight_store import ExpertStore


class DeviceBackward:
    """Answers backward calls, one at a time, where a host's experts lie."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._given, self._answers = PinnedMemory(device), PinnedMemory(device)
        self._met = PinnedMemory(device)

    def answer(
        self, layer: DeviceLayer, pending: PendingCall, buffer: Tensor
    ) -> tuple[PendingSlotGradients, bool]:
        """Write the gradients of a call's rows and weights into ``buffer`` (uint8).

        Returns what is left to add, and whether all that was written is finite. Raises NotHere if
        an expert has no slot on the device any more, and ValueError for float64 experts.
        """
        layout = pending.layout
        there = self._take(pending)
        # Without a copy if the call's answer is taken on the device.
        direct = on_device(buffer)
        out = buffer if direct else torch.empty_like(buffer, device=self._device)
        found = layer.backward(
            *layout.call_tensors(there),
            layout.grad_tensor(there),
            layout.reply_tensor(out),
            layout.grad_weights_tensor(out),
        )
        answered = self._answers.of(0 if direct else layout.reply_bytes)
        answered.copy_(out[: len(answered)], non_blocking=True)
        infinite = wait_for(layer, self._met)
        buffer[: len(answered)].copy_(answered)
        return found, not infinite

    def _take(self, pending: PendingCall) -> Tensor:
        """Return a copy of a call on the device.

        What is left to add needs the call's tensors, and whoever has sent them may write others
        there when the call is answered.
        """
        nbytes = pending.layout.call_bytes
        given = pending.payload[:nbytes]
        if not on_device(given):
            given = self._given.of(nbytes).copy_(given)
        return given.to(self._device, non_blocking=True, copy=True)


class DeviceSums:
    """Sums of gradients on a device, by expert and by the tensor's name.

    An expert's sum stays where it is when the expert goes to another slot, and when it leaves. The
    sums of a layer are made when something is first added to one of its experts, for all of them
    that are here then. They are float32, 4 bytes a parameter, or with ``exact`` float64.
    """

    def __init__(self, store: ExpertStore, *, exact: bool) -> None:
        self._store = store
        self._exact = exact
        self._layers: dict[LayerKey, _LayerSums] = {}

    def add(self, key: LayerKey, slots: LayerSlots, pending: PendingSlotGradients) -> None:
        """Enqueue what is left to add of a call, which was computed with these slots."""
        if key not in self._layers:
            self._layers[key] = _LayerSums(slots, exact=self._exact)
        self._layers[key].add(slots, pending)

    def __iter__(self) -> Iterator[ExpertKey]:
        """Yield the experts that have had tokens, layer by layer; wait for the device."""
        for key, sums in self._layers.items():
            yield from map(key.expert, sums.experts())

    def take(self, key: ExpertKey) -> dict[str, Tensor]:
        """Return an expert's gradients by name, in the model's layout, and forget them.

        The memory of a layer is freed with the last of its experts, so take layer after layer.
        """
        layer = LayerKey(key.model, key.layer)
        sums = self._layers[layer]
        found = self._store.in_models_layout(layer, sums.of(key.expert))
        sums.taken.add(key.expert)  # not before it is copied, for which memory may be short
        if not sums.experts():
            del self._layers[layer]
        return found


class _LayerSums:
    """The sums of one layer, which are ordinary tensors, even if made in inference mode."""

    @torch.inference_mode(False)
    def __init__(self, slots: LayerSlots, *, exact: bool) -> None:
        self.taken: set[int] = set()
        self._exact = exact
        experts, device = slots.table_LE.shape[1], slots.table_LE.device
        self._sums = SlotGradients.zeros(slots, places=0, exact=exact)
        self._places: dict[int, int] = {}
        self._places_E = torch.full((experts,), -1, dtype=torch.int32, device=device)
        self._used_E = torch.zeros(experts, dtype=torch.bool, device=device)
        self._used: list[int] | None = None  # what is there, if it is known here
        # All experts in it have places. It is another one when an expert has come or gone.
        self._table_LE: Tensor | None = None

    def add(self, slots: LayerSlots, pending: PendingSlotGradients) -> None:
        if self._table_LE is not slots.table_LE:
            self._make_places(slots)
            self._table_LE = slots.table_LE
        rows_E = pending.accumulate(self._sums, self._places_E)
        if rows_E is not None:
            self._used_E.logical_or_(rows_E > 0)
            self._used = None

    def experts(self) -> list[int]:
        """Return the experts that have had tokens and were not taken."""
        if self._used is None:
            self._used = self._used_E.nonzero().flatten().tolist()
        return [expert for expert in self._used if expert not in self.taken]

    def of(self, expert: int) -> Mapping[str, Tensor]:
        """Return an expert's sums in the layout of slots. Raises KeyError."""
        return self._sums.at(self._places[expert])

    @torch.inference_mode(False)
    def _make_places(self, slots: LayerSlots) -> None:
        """Give each expert that has a slot, and no sums yet, a place for them."""
        row = slots.table_LE[int(slots.layer)]
        held = row.ge(0).nonzero().flatten().tolist()
        new = [expert for expert in held if expert not in self._places]
        if not new:
            return
        before = len(self._places)
        larger = SlotGradients.zeros(slots, places=before + len(new), exact=self._exact)
        for name, one in larger.sums.items():
            one[:before] = self._sums.sums[name]
        self._sums = larger
        self._places |= {expert: before + n for n, expert in enumerate(new)}
        places = [self._places.get(expert, -1) for expert in range(len(self._places_E))]
        self._places_E.copy_(torch.tensor(places, dtype=torch.int32))
