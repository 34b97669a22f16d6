"""The tensors of one layer's call in a router: what is sent of them, and how the answers add up.

Shape suffixes: T = tokens, H = hidden size, K = choices of a token, N = T * K choices flattened,
t and k = rows and columns of one send.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ..cluster.events import Send
from ..cluster.placement import LayerKey, Number, Placement
from ..proto.expert_pb2 import Frame, Reply
from ..proto.wire import DTYPE_TO_WIRE, CallLayout


class LayerJob:
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
    ) -> None:
        """``without``: rows that nothing is computed for."""
        self.key = key
        self.exact = placement is not None and key.model in placement.exact
        self.x_TH = x_TH.detach()
        self.tokens, self.hidden = x_TH.shape
        self.top_k = ids_TK.shape[1]
        self._number = placement.number if placement else Number(0, 0)
        self._weights_N = weights_TK.detach().to("cpu", torch.float32).reshape(-1).numpy()
        self._parts: list[tuple[Send, Tensor]] = []
        # Rows that an expert made not finite, by expert.
        self.bad_rows: dict[int, list[int]] = {}
        ids = ids_TK.to(device="cpu", dtype=torch.int32, copy=True).numpy()
        layer = placement.layers.get(key) if placement else None
        if layer is not None:
            # transformers marks choices that belong to nobody with the number of experts.
            ids[(ids < 0) | (ids >= len(layer.replicas))] = -1
        rows = list(without)
        if rows:
            ids[[row for row in rows if row < self.tokens]] = -1
        self.ids_TK = ids

    def layout(self, rows: int, top_k: int) -> CallLayout:
        return CallLayout.of(rows, self.hidden, top_k, self.x_TH.dtype, self.exact)

    # ---- sending --------------------------------------------------------------------------------

    def frame(self, send: Send) -> tuple[Frame, CallLayout]:
        rows, top_k = send.choice_tk.shape
        layout = self.layout(rows, top_k)
        frame = Frame()
        call = frame.call
        call.seq = send.seq
        call.model, call.layer = self.key
        call.term, call.epoch = self._number
        call.incarnation = send.incarnation
        call.timeout_us = max(0, int(send.timeout_s * 1e6))
        call.rows, call.hidden, call.top_k = rows, self.hidden, top_k
        call.dtype = DTYPE_TO_WIRE[self.x_TH.dtype]
        call.exact = self.exact
        call.payload_bytes = layout.call_bytes
        return frame, layout

    def write(self, send: Send, layout: CallLayout, buffer: Tensor) -> None:
        """Put the tensors of ``send`` into ``buffer`` (uint8), without a copy in between."""
        x_tH, ids_tk, weights_tk = layout.call_tensors(buffer)
        if layout.rows == self.tokens:
            x_tH.copy_(self.x_TH)
        elif self.x_TH.device.type == "cpu":
            torch.index_select(self.x_TH, 0, torch.from_numpy(send.token_t), out=x_tH)
        else:
            token_t = torch.from_numpy(send.token_t).to(self.x_TH.device)
            x_tH.copy_(self.x_TH.index_select(0, token_t))
        ids_tk.copy_(torch.from_numpy(send.ids_tk))
        # An unused choice (-1) takes some weight; hosts skip it by its id.
        weights_tk.copy_(torch.from_numpy(self._weights_N[send.choice_tk]))

    # ---- receiving ------------------------------------------------------------------------------

    def accept(self, send: Send, reply: Reply, payload: Tensor) -> None:
        """Take the answer to ``send`` out of ``payload`` (uint8), which is free afterwards."""
        rows, top_k = send.choice_tk.shape
        part = self.layout(rows, top_k).reply_tensor(payload).clone()
        self._parts.append((send, part))
        if reply.bad_experts:
            broken_t = ~torch.isfinite(part.view(rows, -1)).all(dim=1).numpy()
            for expert in reply.bad_experts:
                hit_t = (send.ids_tk == expert).any(axis=1) & broken_t
                self.bad_rows.setdefault(expert, []).extend(send.token_t[hit_t].tolist())

    def combine(self) -> Tensor:
        """The sum of all answers (T, H), float32, in an order that does not depend on arrival."""
        return self._combine_exact() if self.exact else self._combine_parts()

    def _combine_exact(self) -> Tensor:
        y_NH = torch.zeros(self.tokens * self.top_k, self.hidden)
        for send, part_tkH in self._parts:
            used = torch.from_numpy(send.choice_tk >= 0)
            y_NH[torch.from_numpy(send.choices)] = part_tkH[used]
        y_TKH = y_NH.view(self.tokens, self.top_k, self.hidden)
        out_TH = y_TKH[:, 0].clone()
        for k in range(1, self.top_k):
            out_TH += y_TKH[:, k]
        return out_TH

    def _combine_parts(self) -> Tensor:
        self._parts.sort(key=lambda part: (part[0].host, part[0].choice_tk[0, 0]))
        out_TH: Tensor | None = None
        for send, part_tH in self._parts:
            whole = send.token_t.size == self.tokens
            if out_TH is None:
                out_TH = part_tH if whole else torch.zeros(self.tokens, self.hidden)
                if whole:
                    continue
            if whole:
                out_TH += part_tH
            else:
                out_TH.index_add_(0, torch.from_numpy(send.token_t), part_tH)
        return torch.zeros(self.tokens, self.hidden) if out_TH is None else out_TH

    def names(self, choices: np.ndarray, at_most: int = 4) -> str:
        """The experts of ``choices``, in words."""
        ids = np.unique(self.ids_TK.reshape(-1)[choices])
        experts = [str(self.key.expert(int(expert))) for expert in ids]
        return ", ".join(experts[:at_most]) + (" and others" if experts[at_most:] else "")
