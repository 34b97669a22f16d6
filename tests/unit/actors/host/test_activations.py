"""What a host keeps of forward calls: for the same computation alone, once, and within a limit.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesaic.actors.host.memory.activations import KeptActivations
from moesaic.kernels.backward.kept import KeptCall, KeptRows
from moesaic.proto.expert_pb2 import Call

LIMIT_BYTES = 1 << 20
Given = tuple[Call, Tensor, Tensor]


def kept(numbers: int = 8) -> KeptCall:
    """It takes 4 bytes a number, and 8 for the index of its row."""
    return KeptCall({0: KeptRows(torch.zeros(1, dtype=torch.long), torch.zeros(1, numbers))})


def given(layer: int = 0, dtype: torch.dtype = torch.float32) -> Given:
    call = Call(model="m", layer=layer, version=3)
    call.other_versions.add(expert=5, version=2)
    x_TH = torch.arange(1.0, 13.0).view(3, 4).to(dtype)
    return call, x_TH, torch.tensor([[0, 5], [2, -1], [1, 0]], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_what_is_kept_is_taken_once_and_freed(dtype: torch.dtype) -> None:
    activations, mine = KeptActivations(), kept()
    activations.begin(LIMIT_BYTES)
    activations.keep(*given(dtype=dtype), mine)
    assert activations.nbytes == mine.nbytes == 40
    call, x_TH, ids_TK = given(dtype=dtype)
    call.seq, call.attempt, call.keep = 7, 1, True  # it may come in any frame
    assert activations.take(call, x_TH, ids_TK) is mine
    assert activations.nbytes == 0
    assert activations.take(call, x_TH, ids_TK) is None
    assert (activations.taken, activations.missed, activations.dropped) == (1, 1, 0)


@pytest.mark.parametrize(
    "change",
    (
        *("model", "layer", "version", "other version", "no other version", "row", "sign"),
        *("expert", "order", "unused", "shape", "type"),
    ),
)
def test_another_computation_finds_nothing(change: str) -> None:
    activations = KeptActivations()
    activations.begin(LIMIT_BYTES)
    activations.keep(*given(), kept())
    call, x_TH, ids_TK = given()
    match change:
        case "model":
            call.model = "n"
        case "layer":
            call.layer = 1
        case "version":
            call.version = 4
        case "other version":
            call.other_versions[0].version = 4
        case "no other version":
            del call.other_versions[:]
        case "row":
            x_TH[2, 3] = torch.nextafter(x_TH[2, 3], torch.tensor(0.0))
        case "sign":
            activations.keep(call, torch.zeros_like(x_TH), ids_TK, kept())
            x_TH = -torch.zeros_like(x_TH)
        case "expert":
            ids_TK[0, 0] = 3
        case "order":
            ids_TK = ids_TK.flip(1).contiguous()
        case "unused":
            ids_TK[0, 0] = -1
        case "shape":
            x_TH, ids_TK = x_TH.view(6, 2), ids_TK.view(6, 1)
        case "type":
            x_TH = x_TH.view(torch.int32)
        case _:
            raise AssertionError(change)
    assert activations.take(call, x_TH, ids_TK) is None
    assert activations.take(*given()) is not None, "it is still there for its own half"


def test_the_oldest_goes_first_where_memory_ends() -> None:
    activations = KeptActivations()
    activations.begin(100)
    for layer in range(5):
        activations.keep(*given(layer), kept())
        assert activations.nbytes <= 100
    found = [activations.take(*given(layer)) is not None for layer in range(5)]
    assert found == [False, False, False, True, True]
    assert activations.dropped == 3
    activations.keep(*given(5), kept(numbers=100))
    assert activations.take(*given(5)) is None, "one call may be too large"
    assert activations.nbytes == 0


def test_a_call_that_comes_again_is_kept_once() -> None:
    activations, second = KeptActivations(), kept()
    activations.begin(LIMIT_BYTES)
    activations.keep(*given(), kept())
    activations.keep(*given(), second)
    assert activations.nbytes == second.nbytes
    assert activations.take(*given()) is second
    assert activations.take(*given()) is None


@pytest.mark.parametrize("ends", ["begin", "end"])
def test_nothing_outlives_an_attempt(ends: str) -> None:
    activations = KeptActivations()
    activations.keep(*given(), kept())
    assert activations.nbytes == 0, "none is under way"
    activations.begin(LIMIT_BYTES)
    activations.keep(*given(), kept())
    if ends == "begin":
        activations.begin(LIMIT_BYTES)
    else:
        activations.end()
        assert activations.limit_bytes == 0
    assert activations.nbytes == 0
    assert activations.take(*given()) is None
