"""The tensors of one layer's call in a router: slicing them for each host, adding up the answers.

What a trunk has on the CPU stays there, and is copied and added in numpy: torch would split even
that over threads, which then wait for cores that the hosts compute on (measured: four times slower
at 512 tokens). What it has on a device is added up there (`DeviceSums`).

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token, N = T * K assignments
flattened, t and k = rows and columns of one send.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ...cluster.expert_keys import ExpertKey, LayerKey
from ...cluster.placement import Placement
from ...cluster.routing.events import Send
from ...cluster.routing.expert_fallback import keep_top_experts
from ...cluster.routing.layer_call import BACKWARD, EXACT_BACKWARD, FORWARD, CallKind
from ...cluster.tracing.layers import LayerTrace
from ...proto.errors import CallError
from ...proto.expert_pb2 import Frame, Reply
from ...proto.wire import DTYPE_TO_WIRE, CallLayout, checksum, wide
from ..runtime.devices import to_cpu
from ..transport.base import call_of
from .backward import BackwardHalf
from .lent_part import LentPart


class LayerTensors:
    """One call of one layer."""

    def __init__(
        self,
        key: LayerKey,
        placement: Placement | None,
        x_TH: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        *,
        without: Iterable[int] = (),
        step: int = 0,
        half: BackwardHalf | None = None,
        keep: bool = False,
        exact: bool = False,
    ) -> None:
        """Take the call's tensors; nothing is computed for the rows in ``without``.

        With ``half`` the call is a backward one; with ``keep`` one follows, so hosts keep
        activations for it. With ``exact`` it is one of an exact model, whatever the placement says.
        """
        self.half = half
        self.key = key
        self.step = step  # the router's forward pass that this call belongs to
        self.exact = exact or (placement is not None and key.model in placement.exact)
        self.trace: LayerTrace | None = None  # of sampled requests
        self.keep = keep and not self.exact  # with `exact` each half has products of its own
        self.kept: list[Send] = []  # parts whose hosts may have kept activations
        self.dtype = x_TH.dtype
        self.x_TH = x_TH.detach().contiguous()
        self.tokens, self.hidden = x_TH.shape
        self.top_k = ids_TK.shape[1]
        ids, weights = _on_cpu(ids_TK, weights_TK.detach().to(wide(self.dtype)))
        self.weights_N = weights.reshape(-1)
        shape = (self.tokens, self.top_k, self.hidden)
        sums = CpuSums if self.x_TH.device.type == "cpu" else DeviceSums
        self._sums: CpuSums | DeviceSums = sums(
            shape, wide(self.dtype), self.x_TH.device, exact=self.exact
        )
        self._lent: LentPart | None = None  # what the router has computed itself
        # For each faulty expert, the rows that have values that are not finite because of it.
        self.bad_rows: dict[int, list[int]] = {}
        rows = list(without)
        if rows:
            ids[[row for row in rows if row < self.tokens]] = -1
        self.ids_TK = ids

    @property
    def kind(self) -> CallKind:
        if self.half is None:
            return FORWARD
        return EXACT_BACKWARD if self.exact else BACKWARD

    def keep_top_experts(self, most_T: np.ndarray) -> None:
        """Keep each row's ``most_T`` assignments of the largest weights; call before any send."""
        weights_TK = self.weights_N.reshape(self.ids_TK.shape)
        self.ids_TK, weights_TK = keep_top_experts(self.ids_TK, weights_TK, most_T)
        self.weights_N = weights_TK.reshape(-1)

    @functools.cached_property
    def _on_cpu(self) -> np.ndarray:
        return _as_numpy(to_cpu(self.x_TH))

    def layout(self, rows: int, top_k: int) -> CallLayout:
        backward = self.half is not None
        return CallLayout.of(rows, self.hidden, top_k, self.dtype, self.exact, backward=backward)

    def rows_per_call(self, slot_bytes: int, most: int | None) -> int:
        """Return how many rows fit in one call to any host, even if all assignments go to it.

        ``most`` is what hosts accept. Raises CallError if not even one fits in ``slot_bytes``. A
        call that is kept has the parts of its backward half, which is larger.
        """
        sizes = 1, self.hidden, self.top_k, self.dtype, self.exact
        one = CallLayout.of(*sizes, backward=self.keep or self.half is not None).slot_bytes
        fit = slot_bytes // one
        if fit < 1:
            raise CallError(
                f"hidden: one row of {self.hidden} with {self.top_k} assignments takes {one} "
                f"bytes, and a call may have at most {slot_bytes}"
            )
        return min(fit, most or fit)

    # ---- sending --------------------------------------------------------------------------------

    def frame(self, send: Send) -> tuple[Frame, CallLayout]:
        rows, top_k = send.assignment_tk.shape
        layout = self.layout(rows, top_k)
        frame = Frame()
        if self.half is not None:
            self.half.announce(frame, send)
        call = call_of(frame)
        call.seq = send.seq
        call.model, call.layer = self.key
        call.term, call.epoch = send.placement_id
        call.incarnation = send.incarnation
        call.timeout_us = max(0, int(send.timeout_s * 1e6))
        call.rows, call.hidden, call.top_k = rows, self.hidden, top_k
        call.dtype = DTYPE_TO_WIRE[self.dtype]
        call.exact = self.exact
        call.payload_bytes = layout.call_bytes
        call.attempt = send.attempt
        call.step = self.step
        call.keep = self.keep
        call.version = send.version
        for expert, version in send.other_versions:
            call.other_versions.add(expert=expert, version=version)
        return frame, layout

    def write(self, send: Send, frame: Frame, layout: CallLayout, buffer: Tensor) -> None:
        """Write the tensors of ``send`` into ``buffer`` (uint8) and their checksum into ``frame``.

        Rows are gathered straight into the buffer, without a temporary copy.
        """
        if buffer.device.type != "cpu":
            self.write_on_device(send, layout, buffer)
            return
        x_tH, ids_tk, weights_tk = map(_as_numpy, layout.call_tensors(buffer))
        if layout.rows == self.tokens:
            x_tH[...] = self._on_cpu
        else:
            np.take(self._on_cpu, send.token_t, axis=0, out=x_tH, mode="clip")
        ids_tk[...] = send.ids_tk
        # An unused assignment (-1) wraps around to some other weight, which does no harm: hosts
        # skip the assignment because its id is -1.
        np.take(self.weights_N, send.assignment_tk, out=weights_tk, mode="wrap")
        if self.half is not None:
            self.half.write(send, layout, buffer)
        call_of(frame).checksum = checksum(send.seq, buffer[: layout.call_bytes])

    def write_on_device(self, send: Send, layout: CallLayout, buffer: Tensor) -> None:
        """Write the tensors of ``send`` into device memory, without moving rows through the CPU."""
        x_tH, ids_tk, weights_tk = layout.call_tensors(buffer)
        x_TH = self.x_TH.to(buffer.device)
        if layout.rows == self.tokens:
            x_tH.copy_(x_TH)
        else:
            torch.index_select(x_TH, 0, _to_device(send.token_t, buffer.device), out=x_tH)
        ids_tk.copy_(_to_device(send.ids_tk, buffer.device))
        weights_tk.copy_(
            _to_device(np.take(self.weights_N, send.assignment_tk, mode="wrap"), buffer.device)
        )
        if self.half is not None:
            self.half.write(send, layout, buffer)

    # ---- receiving ------------------------------------------------------------------------------

    def accept(self, send: Send, reply: Reply, payload: Tensor) -> None:
        """Copy the answer to ``send`` out of ``payload`` (uint8), which is free afterwards."""
        rows, top_k = send.assignment_tk.shape
        layout = self.layout(rows, top_k)
        y_tH = layout.reply_tensor(payload)
        self._sums.take(send, y_tH)
        if self.keep:
            self.kept.append(send)
        if self.half is not None:
            self.half.accept(send, layout, payload)
        if reply.bad_experts:
            broken_t = (~torch.isfinite(y_tH.view(rows, -1)).all(dim=1)).cpu().numpy()
            for expert in reply.bad_experts:
                hit_t = (send.ids_tk == expert).any(axis=1) & broken_t
                self.bad_rows.setdefault(expert, []).extend(send.token_t[hit_t].tolist())

    def accept_lent(self, part: LentPart) -> None:
        """Add what the router has computed with lent experts."""
        self._lent = part
        for expert, rows in part.bad_rows().items():
            self.bad_rows.setdefault(expert, []).extend(rows)

    def combine(self) -> Tensor:
        """Add up all answers to (T, H), wide, in an order that does not depend on arrival."""
        return self._sums.sum(self._lent)

    def rows_of(self, assignments: np.ndarray) -> list[int]:
        return np.unique(assignments // self.top_k).tolist()

    def experts(self, assignments: np.ndarray) -> list[ExpertKey]:
        ids = np.unique(self.ids_TK.reshape(-1)[assignments])
        return [self.key.expert(int(expert)) for expert in ids]

    def names(self, assignments: np.ndarray, at_most: int = 4) -> str:
        """Name the experts of ``assignments`` for an error message."""
        experts = self.experts(assignments)
        more = " and others" if experts[at_most:] else ""
        return ", ".join(map(str, experts[:at_most])) + more


class CpuSums:
    """Adds up the answers to one call on the CPU."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        exact: bool,
    ) -> None:
        """``shape`` is (T, K, H); with ``exact`` hosts answer with a row for each assignment."""
        self._tokens, self._top_k, self._hidden = shape
        self._dtype = np.float64 if dtype == torch.float64 else np.float32
        self._exact = exact
        self._parts: list[tuple[Send, np.ndarray]] = []

    def take(self, send: Send, y: Tensor) -> None:
        """Copy the answer to ``send``; its memory is free afterwards."""
        self._parts.append((send, (y.cpu() if y.is_cuda else y.clone()).numpy()))

    def sum(self, lent: LentPart | None) -> Tensor:
        """Add up all answers and what is ``lent``: (T, H)."""
        return torch.from_numpy(self._sum_exact(lent) if self._exact else self._sum_parts(lent))

    def _sum_exact(self, lent: LentPart | None) -> np.ndarray:
        # Scatter the rows to (N, H) and add up the K assignments of each token one after the other:
        # floating-point addition is not associative, so a fixed order makes the sum independent of
        # which host computed which choice.
        y_NH = np.zeros((self._tokens * self._top_k, self._hidden), dtype=self._dtype)
        for send, part_tkH in self._parts:
            y_NH[send.assignments] = part_tkH[send.assignment_tk >= 0]
        if lent is not None and lent.out is not None:
            mine_N = (lent.ids_TK >= 0).flatten().numpy()
            y_NH[mine_N] = lent.out.view(-1, self._hidden).numpy()[mine_N]
        y_TKH = y_NH.reshape(self._tokens, self._top_k, self._hidden)
        out_TH = y_TKH[:, 0].copy()
        for k in range(1, self._top_k):
            out_TH += y_TKH[:, k]
        return out_TH

    def _sum_parts(self, lent: LentPart | None) -> np.ndarray:
        # Each host answered with one sum per row of its send. If the first part has all rows, it
        # becomes the sum itself, which saves a zeroed array and one addition.
        self._parts.sort(key=_place)
        out_TH: np.ndarray | None = None
        if lent is not None and lent.out is not None:
            out_TH = lent.out.numpy()
        for send, part_tH in self._parts:
            whole = send.token_t.size == self._tokens
            if out_TH is None and whole:
                out_TH = part_tH
                continue
            if out_TH is None:
                out_TH = self._zeros()
            if whole:
                out_TH += part_tH
            else:
                # Fancy indexing adds once per distinct index: a row occurs only once in a send.
                out_TH[send.token_t] += part_tH
        return self._zeros() if out_TH is None else out_TH

    def _zeros(self) -> np.ndarray:
        return np.zeros((self._tokens, self._hidden), dtype=self._dtype)


class DeviceSums:
    """Adds up the answers to one call on the trunk's device, as `CpuSums` does: the same bits."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        exact: bool,
    ) -> None:
        self._tokens, self._top_k, self._hidden = shape
        self._dtype = dtype
        self._device = device
        self._exact = exact
        self._parts: list[tuple[Send, Tensor]] = []
        # Another thread than the one that adds may have begun the copies, on its own stream.
        self._copied: torch.cuda.Event | None = None

    def take(self, send: Send, y: Tensor) -> None:
        """Begin to copy the answer to ``send``; its memory may be used again by what follows."""
        if y.device.type == "cpu":
            on_gpu = self._device.type == "cuda"
            pinned = torch.empty(y.shape, dtype=y.dtype, pin_memory=on_gpu)
            y = pinned.copy_(y)
        self._parts.append((send, y.to(self._device, non_blocking=True, copy=True)))
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            if self._copied is not None:
                stream.wait_event(self._copied)
            self._copied = torch.cuda.Event()
            self._copied.record(stream)

    def sum(self, lent: LentPart | None) -> Tensor:
        """Add up all answers and what is ``lent``: (T, H). Nothing waits for the device."""
        if self._copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._copied)
            for _, part in self._parts:
                part.record_stream(stream)
        return self._sum_exact(lent) if self._exact else self._sum_parts(lent)

    def _sum_exact(self, lent: LentPart | None) -> Tensor:
        y_NH = self._zeros(self._tokens * self._top_k)
        for send, part_tkH in self._parts:
            used = self._here(np.flatnonzero(send.assignment_tk >= 0))
            part_NH = part_tkH.view(-1, self._hidden).index_select(0, used)
            y_NH.index_copy_(0, self._here(send.assignments), part_NH)
        if lent is not None and lent.out is not None:
            mine_N = self._here((lent.ids_TK >= 0).cpu().numpy().reshape(-1))
            y_NH = torch.where(mine_N[:, None], lent.out.view(-1, self._hidden), y_NH)
        y_TKH = y_NH.view(self._tokens, self._top_k, self._hidden)
        out_TH = y_TKH[:, 0].clone()
        for k in range(1, self._top_k):
            out_TH += y_TKH[:, k]
        return out_TH

    def _sum_parts(self, lent: LentPart | None) -> Tensor:
        self._parts.sort(key=_place)
        out_TH = None if lent is None else lent.out
        if out_TH is None:
            out_TH = self._zeros(self._tokens)
        for send, part_tH in self._parts:
            if send.token_t.size == self._tokens:
                out_TH += part_tH
            else:
                # A row occurs only once in a send, so the order of additions is fixed.
                out_TH.index_add_(0, self._here(send.token_t), part_tH)
        return out_TH

    def _zeros(self, rows: int) -> Tensor:
        return torch.zeros(rows, self._hidden, dtype=self._dtype, device=self._device)

    def _here(self, array: np.ndarray) -> Tensor:
        return _to_device(array, self._device)


def _place(part: tuple[Send, object]) -> tuple[str, int]:
    """Return where a part comes in the order of additions, whenever it has arrived."""
    send = part[0]
    return send.host, int(send.assignment_tk[0, 0])


def check_tensors(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> None:
    """Check that the shapes fit together, and the dtype of the rows. Raises CallError."""
    if x_TH.dtype not in DTYPE_TO_WIRE:
        known = ", ".join(str(dtype) for dtype in DTYPE_TO_WIRE)
        raise CallError(f"dtype: hidden states are {x_TH.dtype}; use one of {known}")
    if x_TH.dim() != 2:
        raise CallError(f"hidden states: shape {tuple(x_TH.shape)}; (tokens, hidden) is expected")
    for name, tensor in (("ids", ids_TK), ("weights", weights_TK)):
        if tensor.dim() != 2 or tensor.shape != (x_TH.shape[0], ids_TK.shape[-1]):
            raise CallError(
                f"{name}: shape {tuple(tensor.shape)} for {x_TH.shape[0]} tokens; ids and weights "
                "are both (tokens, assignments)"
            )


def _on_cpu(ids_TK: Tensor, weights_TK: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return a copy of the ids, int32, and the weights; wait for a device once."""
    alike = ids_TK.device == weights_TK.device and weights_TK.dtype == torch.float32
    if ids_TK.is_cuda and alike:
        both = to_cpu(torch.stack([ids_TK.int(), weights_TK.view(torch.int32)]))
        return both[0].numpy(), both[1].view(torch.float32).numpy()
    ids_TK = ids_TK.to(device="cpu", dtype=torch.int32, copy=True)
    return ids_TK.numpy(), weights_TK.cpu().numpy()


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Return a copy on a device, without waiting for it."""
    found = torch.from_numpy(array)
    if device.type != "cuda":
        return found.to(device)
    return found.pin_memory().to(device, non_blocking=True)


def _as_numpy(tensor: Tensor) -> np.ndarray:
    """Return a view of the same memory; 16-bit floats become int16, as numpy lacks bfloat16."""
    return tensor.view(torch.int16).numpy() if tensor.itemsize == 2 else tensor.numpy()
