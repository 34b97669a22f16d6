"""The tensors of one layer's call in a router: slicing them for each host, adding up the answers.

This code runs on the CPU and in numpy, except for calls that go into device memory. It only copies
and adds rows. torch would split even that over threads, which then wait for cores that the hosts
compute on (measured: four times slower at 512 tokens).

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
from ...proto.errors import CallError
from ...proto.expert_pb2 import Frame, Reply
from ...proto.wire import DTYPE_TO_WIRE, CallLayout, checksum
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
    ) -> None:
        """Take the call's tensors; nothing is computed for the rows in ``without``."""
        self.key = key
        self.step = step  # the router's forward pass that this call belongs to
        self.exact = placement is not None and key.model in placement.exact
        self.dtype = x_TH.dtype
        self.x_TH = x_TH.detach().contiguous()
        self.tokens, self.hidden = x_TH.shape
        self.top_k = ids_TK.shape[1]
        self.weights_N = weights_TK.detach().to("cpu", torch.float32).reshape(-1).numpy()
        self._parts: list[tuple[Send, np.ndarray]] = []
        self._lent: LentPart | None = None  # what the router has computed itself
        # For each faulty expert, the rows that have values that are not finite because of it.
        self.bad_rows: dict[int, list[int]] = {}
        ids = ids_TK.to(device="cpu", dtype=torch.int32, copy=True).numpy()
        rows = list(without)
        if rows:
            ids[[row for row in rows if row < self.tokens]] = -1
        self.ids_TK = ids

    def keep_top_experts(self, most_T: np.ndarray) -> None:
        """Keep each row's ``most_T`` assignments of the largest weights; call before any send."""
        weights_TK = self.weights_N.reshape(self.ids_TK.shape)
        self.ids_TK, weights_TK = keep_top_experts(self.ids_TK, weights_TK, most_T)
        self.weights_N = weights_TK.reshape(-1)

    @functools.cached_property
    def _on_cpu(self) -> np.ndarray:
        return _as_numpy(self.x_TH.to("cpu"))

    def layout(self, rows: int, top_k: int) -> CallLayout:
        return CallLayout.of(rows, self.hidden, top_k, self.dtype, self.exact)

    def rows_per_call(self, slot_bytes: int, most: int | None) -> int:
        """Return how many rows fit in one call to any host, even if all assignments go to it.

        ``most`` is what hosts accept. Raises CallError if not even one fits in ``slot_bytes``.
        """
        one = self.layout(1, self.top_k).slot_bytes
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
        call = frame.call
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
        frame.call.checksum = checksum(send.seq, buffer[: layout.call_bytes])

    def write_on_device(self, send: Send, layout: CallLayout, buffer: Tensor) -> None:
        """Write the tensors of ``send`` into device memory, without moving rows through the CPU."""
        x_tH, ids_tk, weights_tk = layout.call_tensors(buffer)
        x_TH = self.x_TH.to(buffer.device)
        if layout.rows == self.tokens:
            x_tH.copy_(x_TH)
        else:
            token_t = torch.from_numpy(send.token_t).to(buffer.device)
            torch.index_select(x_TH, 0, token_t, out=x_tH)
        ids_tk.copy_(torch.from_numpy(send.ids_tk))
        weights_tk.copy_(torch.from_numpy(np.take(self.weights_N, send.assignment_tk, mode="wrap")))

    # ---- receiving ------------------------------------------------------------------------------

    def accept(self, send: Send, reply: Reply, payload: Tensor) -> None:
        """Copy the answer to ``send`` out of ``payload`` (uint8), which is free afterwards."""
        rows, top_k = send.assignment_tk.shape
        y_tH = self.layout(rows, top_k).reply_tensor(payload)
        # Both branches copy, because the payload's memory is reused after this call.
        part = y_tH.numpy().copy() if y_tH.device.type == "cpu" else y_tH.cpu().numpy()
        self._parts.append((send, part))
        if reply.bad_experts:
            broken_t = ~np.isfinite(part.reshape(rows, -1)).all(axis=1)
            for expert in reply.bad_experts:
                hit_t = (send.ids_tk == expert).any(axis=1) & broken_t
                self.bad_rows.setdefault(expert, []).extend(send.token_t[hit_t].tolist())

    def accept_lent(self, part: LentPart) -> None:
        """Add what the router has computed with lent experts."""
        self._lent = part
        for expert, rows in part.bad_rows().items():
            self.bad_rows.setdefault(expert, []).extend(rows)

    def combine(self) -> Tensor:
        """Add up all answers to (T, H) float32, in an order that does not depend on arrival."""
        return torch.from_numpy(self._combine_exact() if self.exact else self._combine_parts())

    def _combine_exact(self) -> np.ndarray:
        # Hosts answered with one row per assignment. Scatter the rows to (N, H) and add up the K
        # assignments of each token one after the other: floating-point addition is not associative,
        # so a fixed order makes the sum independent of which host computed which choice.
        y_NH = np.zeros((self.tokens * self.top_k, self.hidden), dtype=np.float32)
        for send, part_tkH in self._parts:
            y_NH[send.assignments] = part_tkH[send.assignment_tk >= 0]
        if self._lent is not None and self._lent.out is not None:
            mine_N = (self._lent.ids_TK >= 0).flatten().numpy()
            y_NH[mine_N] = self._lent.out.view(-1, self.hidden).numpy()[mine_N]
        y_TKH = y_NH.reshape(self.tokens, self.top_k, self.hidden)
        out_TH = y_TKH[:, 0].copy()
        for k in range(1, self.top_k):
            out_TH += y_TKH[:, k]
        return out_TH

    def _combine_parts(self) -> np.ndarray:
        # Each host answered with one sum per row of its send. Sorting makes the order of additions
        # independent of the order of arrival. If the first part has all rows, it becomes the sum
        # itself, which saves a zeroed array and one addition.
        self._parts.sort(key=lambda part: (part[0].host, part[0].assignment_tk[0, 0]))
        out_TH: np.ndarray | None = None
        if self._lent is not None and self._lent.out is not None:
            out_TH = self._lent.out.numpy()
        for send, part_tH in self._parts:
            whole = send.token_t.size == self.tokens
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
        return np.zeros((self.tokens, self.hidden), dtype=np.float32)

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


def _as_numpy(tensor: Tensor) -> np.ndarray:
    """Return a view of the same memory; 16-bit floats become int16, as numpy lacks bfloat16."""
    return tensor.view(torch.int16).numpy() if tensor.itemsize == 2 else tensor.numpy()
