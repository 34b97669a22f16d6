"""The computation of one batch on a device, for which the host waits once.

Calls that came through the CPU's memory are put together in pinned memory: one copy takes them all
to the device, and one brings the answers back. Between them nothing waits, and copies are not cut
into pieces as those of other memory are. All of it is one chain, so one stream is enough.

Shape suffixes: T = tokens (of merged calls), H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...cluster.expert_keys import LayerKey
from ...kernels.slabs.layer_arithmetic import DeviceLayer
from ...proto.errors import NotHere
from ...proto.wire import CallLayout
from .compute import PendingCall, ReplyTensors, bounds_of, compute, layer_of
from .weight_store import ExpertStore


class PinnedMemory:
    """The CPU's memory through which copies to or from a device go; it grows with the largest."""

    def __init__(self, device: torch.device) -> None:
        self._pins = device.type == "cuda"
        self._memory = self._make(0)

    def of(self, nbytes: int) -> Tensor:
        """Return memory (uint8) that is in use until the next call."""
        if self._memory.numel() < nbytes:
            self._memory = self._make(1 << (nbytes - 1).bit_length())
        return self._memory[:nbytes]

    def _make(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pins)


class BatchCompute:
    """Answers batches, one at a time, where a host's experts lie."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._given, self._answers = PinnedMemory(device), PinnedMemory(device)
        self._met = PinnedMemory(device)

    def __call__(
        self, store: ExpertStore, key: LayerKey, pendings: Sequence[PendingCall], *, exact: bool
    ) -> list[ReplyTensors]:
        """Answer all calls, as `compute` does.

        Raises NotHere if an expert of any has no slot on the device any more.
        """
        layer = layer_of(store, key, pendings)
        if isinstance(layer, DeviceLayer):
            return self._on_device(layer, pendings, exact=exact)
        return compute(store, key, pendings, exact=exact)

    def _on_device(
        self, layer: DeviceLayer, pendings: Sequence[PendingCall], *, exact: bool
    ) -> list[ReplyTensors]:
        x_TH, ids_TK, weights_TK = self._take(pendings, exact=exact)
        buffers = [p.session.reply_buffer(p.frame, p.layout) for p in pendings]
        replies = [p.layout.reply_tensor(b) for p, b in zip(pendings, buffers, strict=True)]
        shape = (*ids_TK.shape, x_TH.shape[1]) if exact else x_TH.shape
        # A single call that waits for its answer on the device is computed straight into it.
        direct = len(pendings) == 1 and on_device(buffers[0])
        out = (
            replies[0]
            if direct
            else torch.empty(shape, dtype=pendings[0].layout.wide, device=self._device)
        )
        layer.compute(x_TH, ids_TK, weights_TK, out, exact=exact)

        bounds = bounds_of(pendings)
        answered: Tensor | None = None
        if not all(map(on_device, buffers)):
            answered = self._answers.of(out.nbytes).view(out.dtype).view(shape)
            answered.copy_(out, non_blocking=True)
        for reply, (start, end) in zip(replies, bounds, strict=True):
            if on_device(reply) and not direct:
                reply.copy_(_cut(out[start:end], reply))
        infinite = wait_for(layer, self._met)
        found = []
        for (start, end), reply, buffer in zip(bounds, replies, buffers, strict=True):
            if answered is not None and not on_device(reply):
                reply.copy_(_cut(answered[start:end], reply))
            given = x_TH[start:end], ids_TK[start:end]
            found.append(ReplyTensors(buffer, layer.search(*given, reply) if infinite else []))
        return found

    def _take(
        self, pendings: Sequence[PendingCall], *, exact: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (x_TH, ids_TK, weights_TK) of all calls on the device."""
        if len(pendings) == 1 and on_device(pendings[0].payload):
            return pendings[0].layout.call_tensors(pendings[0].payload)
        layouts = [pending.layout for pending in pendings]
        merged = CallLayout.of(
            sum(layout.rows for layout in layouts),
            layouts[0].hidden,
            max(layout.top_k for layout in layouts),
            layouts[0].dtype,
            exact,
        )
        there = torch.empty(merged.call_bytes, dtype=torch.uint8, device=self._device)
        if not all(on_device(pending.payload) for pending in pendings):
            here = self._given.of(merged.call_bytes)
            _merge(merged.call_tensors(here), pendings, there=False)
            there.copy_(here, non_blocking=True)
        tensors = merged.call_tensors(there)
        _merge(tensors, pendings, there=True)
        return tensors


def wait_for(layer: DeviceLayer, met: PinnedMemory) -> bool:
    """Wait for the device; return whether something that was computed is not finite.

    Raises NotHere if an expert has no slot any more.
    """
    flags = met.of(layer.flags.both.nbytes).view(torch.int32)
    flags.copy_(layer.flags.both, non_blocking=True)
    if layer.ids_device.type == "cuda":
        torch.cuda.current_stream(layer.ids_device).synchronize()
    missing, infinite = flags.tolist()
    if missing:
        raise NotHere("an expert of this call left the host while the call waited")
    return bool(infinite)


def on_device(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


def _cut(rows: Tensor, reply: Tensor) -> Tensor:
    """Return rows as they were asked for: with ``exact``, without assignments of other calls."""
    return rows[:, : reply.shape[1]] if reply.dim() == 3 else rows


def _merge(
    tensors: tuple[Tensor, Tensor, Tensor], pendings: Sequence[PendingCall], *, there: bool
) -> None:
    """Copy calls that lie on the device (``there``), or the others, to their rows of all calls'.

    A call with fewer assignments than others gets unused ones.
    """
    x_TH, ids_TK, weights_TK = tensors
    for pending, (start, end) in zip(pendings, bounds_of(pendings), strict=True):
        if on_device(pending.payload) != there:
            continue
        x, ids, weights = pending.layout.call_tensors(pending.payload)
        top_k = pending.layout.top_k
        x_TH[start:end].copy_(x)
        ids_TK[start:end, :top_k].copy_(ids)
        ids_TK[start:end, top_k:].fill_(-1)
        weights_TK[start:end, :top_k].copy_(weights)
        weights_TK[start:end, top_k:].fill_(0)
