"""Experts in slots, as the grouped FFN takes them, and what float64 says of a call.

Shape suffixes: T = tokens, K = assignments of a token, H = hidden size, S = slots, L = layers, E =
experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moesaic.kernels.ffn import ExpertWeights, reference_kernel
from moesaic.kernels.grouped.activation import Activation
from moesaic.kernels.grouped.slots import LayerSlots, SlotForm, to_slot
from tests.helpers.models.forms import Kind

LAYERS, LAYER = 3, 1


def slots_of(
    kind: Kind,
    experts: Mapping[int, ExpertWeights],
    places: Mapping[int, int],
    *,
    table_size: int,
    device: str = "cpu",
    recognised: bool = True,
) -> LayerSlots:
    """Lay experts in the slots that ``places`` names; whatever is not written is NaN."""
    activation = Activation.of(kind.activate, gated=kind.gated) if recognised else None
    form = SlotForm(
        activation,
        kind.activate if activation is None else None,
        kind.form.post_norm,
    )
    count = max(places.values()) + 2
    table_LE = torch.full((LAYERS, table_size), -1, dtype=torch.int32)
    parts: dict[str, Tensor] = {}
    for number, expert in experts.items():
        filled = to_slot(activation, expert.tensors(), transposed=kind.transposed)
        for name, tensor in filled.items():
            slots = parts.setdefault(name, tensor.new_full((count, *tensor.shape), torch.nan))
            slots[places[number]] = tensor
        table_LE[LAYER, number] = places[number]
    return LayerSlots(
        form,
        parts["up"].to(device),
        parts["down"].to(device),
        parts["up_bias"].to(device) if "up_bias" in parts else None,
        parts["down_bias"].to(device) if "down_bias" in parts else None,
        table_LE.to(device),
        torch.tensor(LAYER, dtype=torch.int32, device=device),
    )


def oracle(
    kind: Kind,
    experts: Mapping[int, ExpertWeights],
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
) -> Tensor:
    """The call in float64, on the CPU."""
    wide = {
        number: ExpertWeights.of({n: t.double().cpu() for n, t in expert.tensors().items()})
        for number, expert in experts.items()
    }
    out_TH = torch.full(x_TH.shape, torch.nan, dtype=torch.float64)
    reference_kernel(
        kind.form, wide, x_TH.double().cpu(), ids_TK.cpu(), weights_TK.double().cpu(), out_TH
    )
    return out_TH


class HostMemory:
    """A device's memory, played by the CPU's; it counts what is backed, and wipes what is not."""

    def __init__(self, nbytes: int, *, chunk_bytes: int = 1024) -> None:
        self.chunk_bytes = chunk_bytes
        self._chunks = -(-nbytes // chunk_bytes)
        self._bytes = torch.zeros(self._chunks * chunk_bytes, dtype=torch.uint8)
        self._users = [0] * self._chunks
        self.closed = False

    @property
    def backed_bytes(self) -> int:
        return sum(users > 0 for users in self._users) * self.chunk_bytes

    def back(self, start: int, nbytes: int) -> None:
        for chunk in self._overlapped(start, nbytes):
            self._users[chunk] += 1

    def release(self, start: int, nbytes: int) -> None:
        for chunk in self._overlapped(start, nbytes):
            self._users[chunk] -= 1
            assert self._users[chunk] >= 0
            if self._users[chunk] == 0:
                self._bytes.view(-1, self.chunk_bytes)[chunk] = 255  # NaN in every type

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert self._users[0] > 0, "a device shows nothing of what it has no memory for"
        return self._bytes[: torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)

    def close(self) -> None:
        self._users = [0] * self._chunks
        self.closed = True

    def _overlapped(self, start: int, nbytes: int) -> range:
        return range(start // self.chunk_bytes, (start + nbytes - 1) // self.chunk_bytes + 1)
