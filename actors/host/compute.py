"""The computation of one batch: it merges calls of several routers and splits the result.

Shape suffixes: T = tokens (of merged calls), H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...cluster.expert_keys import LayerKey
from ...kernels.slabs.layer_arithmetic import LayerArithmetic
from ...proto.expert_pb2 import Frame
from ...proto.wire import CallLayout
from ..transport.base import Session, call_of
from .weight_store import ExpertStore


@dataclass(slots=True)
class PendingCall:
    """The tensors of a queued call and where its answer goes."""

    session: Session
    frame: Frame
    layout: CallLayout
    payload: Tensor
    arrived: float


@dataclass(frozen=True, slots=True)
class ReplyTensors:
    """A reply's tensors in ``buffer`` (uint8); ``bad``: experts whose output was not finite."""

    buffer: Tensor
    bad: list[int]


class Compute(Protocol):
    """Answers a batch, as `compute` does."""

    def __call__(
        self, store: ExpertStore, key: LayerKey, pendings: Sequence[PendingCall], *, exact: bool
    ) -> list[ReplyTensors]: ...


def layer_of(store: ExpertStore, key: LayerKey, pendings: Sequence[PendingCall]) -> LayerArithmetic:
    """Return the arithmetic of calls that name the same versions of a layer's experts."""
    first = call_of(pendings[0].frame)
    others = {other.expert: other.version for other in first.other_versions}
    return store.layer(key, first.version, others)


def compute(
    store: ExpertStore, key: LayerKey, pendings: Sequence[PendingCall], *, exact: bool
) -> list[ReplyTensors]:
    """Answer all calls on the CPU, with one grouped computation.

    ``exact`` asks for one row per assignment instead of one sum per token.
    """
    layer = layer_of(store, key, pendings)
    tensors = [pending.layout.call_tensors(pending.payload.cpu()) for pending in pendings]
    if len(pendings) == 1:
        x_TH, ids_TK, weights_TK = tensors[0]
    else:
        x_TH = torch.cat([x for x, _, _ in tensors])
        ids_TK = _stack([ids for _, ids, _ in tensors], fill=-1)
        weights_TK = _stack([weights for _, _, weights in tensors], fill=0)
    buffers = [p.session.reply_buffer(p.frame, p.layout) for p in pendings]
    replies = [p.layout.reply_tensor(b) for p, b in zip(pendings, buffers, strict=True)]
    # A single call is computed straight into its reply buffer, which saves a copy.
    direct = len(pendings) == 1 and buffers[0].device.type == "cpu"
    shape = (*ids_TK.shape, x_TH.shape[1]) if exact else x_TH.shape
    out = replies[0] if direct else torch.empty(shape, dtype=pendings[0].layout.wide)
    layer.compute(x_TH, ids_TK, weights_TK, out, exact=exact)
    answers = []
    bounds = bounds_of(pendings)
    for pending, (start, end), reply, buffer in zip(
        pendings, bounds, replies, buffers, strict=True
    ):
        if not direct:
            reply.copy_(out[start:end, : pending.layout.top_k] if exact else out[start:end])
        bad = layer.bad_experts(x_TH[start:end], ids_TK[start:end], reply)
        answers.append(ReplyTensors(buffer, bad))
    return answers


def bounds_of(pendings: Sequence[PendingCall]) -> list[tuple[int, int]]:
    """Return where the rows of each call begin and end among those of all."""
    ends = itertools.accumulate((pending.layout.rows for pending in pendings), initial=0)
    return list(itertools.pairwise(ends))


def _stack(parts: list[Tensor], fill: float) -> Tensor:
    """Concatenate the rows of calls; pad their assignments with ``fill`` to the largest K."""
    top_k = max(part.shape[1] for part in parts)
    stacked = parts[0].new_full((sum(part.shape[0] for part in parts), top_k), fill)
    start = 0
    for part in parts:
        stacked[start : start + part.shape[0], : part.shape[1]] = part
        start += part.shape[0]
    return stacked
