"""Batches that a host computes on its device, played by the CPU, or a card's where one is.

Shape suffixes: T = tokens, K = assignments of a token, H = hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from moesaic.actors.host.compute import PendingCall, ReplyTensors
from moesaic.actors.host.device_compute import BatchCompute
from moesaic.cluster.expert_keys import LayerKey
from moesaic.kernels.slabs.layer_arithmetic import DeviceLayer
from moesaic.proto.errors import NotHere
from moesaic.proto.expert_pb2 import Frame
from moesaic.proto.wire import CallLayout
from tests.helpers.models.forms import HIDDEN, KINDS, random_experts
from tests.helpers.models.slots import LAYER, oracle, slots_of

KIND = KINDS["gated-bias"]
EXPERTS, PLACES = 8, {0: 3, 2: 1, 5: 4, 7: 0}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]

# The interpreter multiplies whole tiles with NumPy, unused rows included.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow) encountered:RuntimeWarning"
)

Call = tuple[Tensor, Tensor, Tensor]


def call(tokens: int, top_k: int, seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)
    held = torch.tensor([*PLACES, -1], dtype=torch.int32)
    drawn = torch.stack([torch.randperm(5, generator=generator)[:top_k] for _ in range(tokens)])
    return (
        torch.randn(tokens, HIDDEN, generator=generator),
        held[drawn],
        torch.rand(tokens, top_k, generator=generator),
    )


class Session:
    """Calls whose tensors lie ``where``, and their answers, too."""

    def __init__(self, where: str) -> None:
        self.where = where

    def reply_buffer(self, frame: Frame, layout: CallLayout) -> Tensor:
        return torch.full((layout.reply_bytes,), 0xFF, dtype=torch.uint8, device=self.where)

    def pending(self, given: Call, *, exact: bool) -> PendingCall:
        x_TH, ids_TK, _ = given
        rows, top_k = ids_TK.shape
        layout = CallLayout.of(rows, HIDDEN, top_k, x_TH.dtype, exact)
        payload = torch.zeros(layout.call_bytes, dtype=torch.uint8, device=self.where)
        for there, tensor in zip(layout.call_tensors(payload), given, strict=True):
            there.copy_(tensor)
        frame = Frame()
        frame.call.version = 1
        return PendingCall(cast(Any, self), frame, layout, payload, 0.0)


class Batches:
    def __init__(self, device: str) -> None:
        self.experts = random_experts(KIND, PLACES)
        slots = slots_of(KIND, self.experts, PLACES, table_size=EXPERTS, device=device)
        # As a host has them: a table of this layer alone.
        self.slots = replace(slots, table_LE=slots.table_LE[LAYER:][:1], layer=slots.layer * 0)
        self.computes = BatchCompute(torch.device(device))

    def run(self, pendings: list[PendingCall], *, exact: bool = False) -> list[ReplyTensors]:
        layer = DeviceLayer(self.slots)
        store: Any = SimpleNamespace(layer=lambda key, version, others: layer)
        return self.computes(store, LayerKey("m", LAYER), pendings, exact=exact)

    def expected(self, given: Call, *, exact: bool) -> Tensor:
        x_TH, ids_TK, weights_TK = given
        if not exact:
            return oracle(KIND, self.experts, *given)
        columns = range(ids_TK.shape[1])
        parts = [
            oracle(KIND, self.experts, x_TH, ids_TK[:, k : k + 1], weights_TK[:, k : k + 1])
            for k in columns
        ]
        return torch.stack(parts, dim=1)


@pytest.fixture(params=DEVICES)
def batches(request: pytest.FixtureRequest) -> Batches:
    return Batches(request.param)


@pytest.mark.parametrize("on_device", [False, pytest.param(True, marks=pytest.mark.cuda)])
@pytest.mark.parametrize("exact", [False, True])
def test_each_call_of_a_batch_gets_its_own_answer(
    batches: Batches, exact: bool, on_device: bool
) -> None:
    """Of one router and of several, large ones after small ones and before."""
    session = Session("cuda" if on_device else "cpu")
    for round_, sizes in enumerate(
        ([(3, 2)], [(1, 4), (5, 1), (2, 3)], [(20, 2), (1, 2)], [(2, 1)])
    ):
        calls = [call(*size, seed=10 * round_ + n) for n, size in enumerate(sizes)]
        pendings = [session.pending(given, exact=exact) for given in calls]
        answers = batches.run(pendings, exact=exact)
        for given, pending, answer in zip(calls, pendings, answers, strict=True):
            reply = pending.layout.reply_tensor(answer.buffer).cpu()
            expected = batches.expected(given, exact=exact).float()
            torch.testing.assert_close(reply, expected, atol=1e-5, rtol=1e-5)
            assert answer.bad == []


@pytest.mark.cuda
def test_calls_in_different_memory_are_computed_together() -> None:
    batches = Batches("cuda")
    calls = [call(3, 2, seed=1), call(4, 3, seed=2), call(2, 1, seed=3)]
    sessions = [Session(where) for where in ("cuda", "cpu", "cuda")]
    pendings = [s.pending(given, exact=False) for s, given in zip(sessions, calls, strict=True)]
    for given, pending, answer in zip(calls, pendings, batches.run(pendings), strict=True):
        reply = pending.layout.reply_tensor(answer.buffer).cpu()
        expected = batches.expected(given, exact=False).float()
        torch.testing.assert_close(reply, expected, atol=1e-5, rtol=1e-5)


def test_an_expert_that_breaks_a_call_is_named_in_its_answer_only(batches: Batches) -> None:
    batches.slots.down_SHI[PLACES[5]] = torch.inf
    calls = [call(3, 2, seed=1), call(3, 2, seed=2)]
    calls[0][1][:] = torch.tensor([0, 5])
    calls[1][1][:] = torch.tensor([0, 7])
    session = Session("cpu")
    answers = batches.run([session.pending(given, exact=False) for given in calls])
    assert [answer.bad for answer in answers] == [[5], []]


def test_an_expert_without_a_slot_is_an_error(batches: Batches) -> None:
    given = call(3, 2, seed=1)
    given[1][1, 0] = 6
    with pytest.raises(NotHere, match="left the host"):
        batches.run([Session("cpu").pending(given, exact=False)])
