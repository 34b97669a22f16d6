"""Backward calls that a host answers on its device, played by the CPU, and the sums there.

Shape suffixes: T = tokens, K = assignments of a token, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.actors.host.compute import PendingCall
from moesaic.actors.host.device_gradients import DeviceBackward, DeviceSums
from moesaic.cluster.expert_keys import LayerKey
from moesaic.kernels.grouped.activation import Activation
from moesaic.kernels.grouped.slots import from_slot
from moesaic.kernels.slabs.layer_arithmetic import DeviceLayer
from moesaic.proto.errors import NotHere
from moesaic.proto.expert_pb2 import Frame
from moesaic.proto.wire import CallLayout
from tests.helpers.models.forms import HIDDEN, KINDS, random_experts
from tests.helpers.models.gradients import (
    Gradients,
    assert_gradients_near,
    autograd_oracle,
)
from tests.helpers.models.slots import LAYER, slots_of

KIND = KINDS["interleaved-clamped"]
KEY = LayerKey("m", LAYER)
EXPERTS, TOP_K = 8, 2
BEFORE, AFTER = {0: 3, 2: 1, 5: 4}, {2: 0, 5: 2, 7: 1}  # the slots of the experts
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]

# The interpreter multiplies whole tiles with NumPy, unused rows included.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow) encountered:RuntimeWarning"
)

Call = tuple[Tensor, Tensor, Tensor, Tensor]


class Host:
    """The device, and what was added up there."""

    def __init__(self, device: str, where: str, *, exact: bool = False) -> None:
        """Calls and their answers lie ``where``."""
        self.device, self.where = device, where
        self.experts = random_experts(KIND, BEFORE | AFTER)
        store: Any = SimpleNamespace(in_models_layout=self.in_models_layout)
        self.sums = DeviceSums(store, exact=exact)
        self.computes = DeviceBackward(torch.device(device))

    def in_models_layout(self, key: LayerKey, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        activation = Activation.of(KIND.activate, gated=KIND.gated)
        return from_slot(activation, tensors, transposed=KIND.transposed)

    def layer(self, places: Mapping[int, int]) -> DeviceLayer:
        held = {expert: self.experts[expert] for expert in places}
        slots = slots_of(KIND, held, places, table_size=EXPERTS, device=self.device)
        # As a host has them: a table of this layer alone.
        return DeviceLayer(
            replace(slots, table_LE=slots.table_LE[LAYER:][:1], layer=slots.layer * 0)
        )

    def answer(
        self, layer: DeviceLayer, given: Call, *, adds: bool = True
    ) -> tuple[Tensor, Tensor, bool]:
        """Return the gradients of x and of the weights, and whether they are finite."""
        rows, hidden = given[0].shape
        layout = CallLayout.of(rows, hidden, TOP_K, torch.float32, False, backward=True)
        payload = torch.zeros(layout.call_bytes, dtype=torch.uint8, device=self.where)
        tensors = *layout.call_tensors(payload), layout.grad_tensor(payload)
        for there, tensor in zip(tensors, given, strict=True):
            there.copy_(tensor)
        buffer = torch.full((layout.reply_bytes,), 0xFF, dtype=torch.uint8, device=self.where)
        session: Any = None
        pending = PendingCall(session, Frame(), layout, payload, 0.0)
        with torch.inference_mode():
            found, finite = self.computes.answer(layer, pending, buffer)
            payload.fill_(0xFF)  # the sender writes the next call there
            if adds:
                self.sums.add(KEY, layer.slots, found)
        return layout.reply_tensor(buffer), layout.grad_weights_tensor(buffer), finite

    def taken(self) -> dict[int, dict[str, Tensor]]:
        return {key.expert: self.sums.take(key) for key in list(self.sums)}


def call(experts: list[int], tokens: int, seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, len(experts), (tokens, TOP_K), generator=generator)
    x_TH, grad_y_TH = (torch.randn(tokens, HIDDEN, generator=generator) / 4 for _ in range(2))
    ids_TK = torch.tensor(experts, dtype=torch.int32)[drawn]
    return x_TH, ids_TK, torch.rand(tokens, TOP_K, generator=generator), grad_y_TH


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("device", "where"),
    [
        ("cpu", "cpu"),
        pytest.param("cuda", "cpu", marks=pytest.mark.cuda),
        pytest.param("cuda", "cuda", marks=pytest.mark.cuda),
    ],
)
def test_sums_are_of_experts_whichever_slots_they_are_in(
    device: str, where: str, exact: bool
) -> None:
    """Between two calls one leaves, one comes, and the others go to other slots."""
    host = Host(device, where, exact=exact)
    wanted: dict[int, dict[str, Tensor]] = {}
    for seed, (places, used) in enumerate([(BEFORE, [0, 5, -1]), (AFTER, [5, 7]), (BEFORE, [0])]):
        given = call(used, 9, seed)
        x_TH, weights_TK, finite = host.answer(host.layer(places), given)
        assert finite
        expected = autograd_oracle(KIND, host.experts, *given)
        assert_gradients_near(Gradients(x_TH, weights_TK, {}), replace(expected, experts={}), 1e-5)
        for expert, tensors in expected.experts.items():
            own = wanted.setdefault(expert, {})
            wanted[expert] = {n: own.get(n, 0.0) + t for n, t in tensors.items()}
    assert [key.expert for key in host.sums] == [0, 5, 7], "2 had no tokens"
    found = host.taken()
    kept = torch.float64 if exact else torch.float32
    assert {one.dtype for own in found.values() for one in own.values()} == {kept}
    nothing = torch.zeros(0), torch.zeros(0)
    assert_gradients_near(Gradients(*nothing, found), Gradients(*nothing, wanted), 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_taken_is_gone_and_its_layer_is_freed_with_the_last(device: str) -> None:
    host = Host(device, "cpu")
    host.answer(host.layer(BEFORE), call([0, 5], 6, 0))
    first, second = host.sums
    host.sums.take(first)
    assert list(host.sums) == [second]
    host.sums.take(second)
    assert list(host.sums) == []
    with pytest.raises(KeyError):
        host.sums.take(second)


@pytest.mark.parametrize("device", DEVICES)
def test_an_expert_without_a_slot_is_an_error_and_adds_nothing(device: str) -> None:
    host = Host(device, "cpu")
    with pytest.raises(NotHere, match="left the host"):
        host.answer(host.layer(BEFORE), call([0, 7], 6, 0))
    assert list(host.sums) == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("where", ["x", "weights"])
def test_gradients_that_are_not_finite_are_noticed(device: str, where: str) -> None:
    """An overflow in a gate weight's gradient alone, too."""
    host = Host(device, "cpu")
    x_TH, ids_TK, weights_TK, grad_y_TH = call([0, 5], 6, 0)
    if where == "x":
        grad_y_TH[2, 0] = torch.inf
    else:
        grad_y_TH.fill_(1e37)
        weights_TK.zero_()  # so that the gradients of x are zero
        bias_H = host.experts[5].down_bias
        assert bias_H is not None
        bias_H.fill_(100.0)
    gradients = host.answer(host.layer(BEFORE), (x_TH, ids_TK, weights_TK, grad_y_TH), adds=False)
    x, weights, finite = gradients
    assert not finite
    assert bool(x.isfinite().all()) == (where == "weights")
    assert not weights.isfinite().all()
