"""Bad calls to the router service, as bytes and as arrays: one clear error each, and it goes on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from moesaic.actors.router_service.service import SERVICE, ServicePolicy
from moesaic.actors.transport.grpc.border import from_grpc
from moesaic.actors.transport.grpc.interceptors import show_key
from moesaic.proto.errors import BadInput, CallError, Corrupted, MoesaicError, UnknownModel
from moesaic.proto.limits import MAX_HIDDEN
from moesaic.proto.router_pb2 import ComputeReply, ComputeRequest
from moesaic.proto.router_pb2_grpc import RouterStub
from tests.helpers.pool.router_services import KEY, Inputs, Served, data_of, head_of, router_service
from tests.helpers.pool.serving import HIDDEN, LAYER, inputs, save_model

GIVEN = inputs(4)
DATA = data_of(GIVEN)
STATUS = {
    CallError: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownModel: grpc.StatusCode.NOT_FOUND,
    Corrupted: grpc.StatusCode.UNAVAILABLE,
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = save_model(tmp_path_factory.mktemp("model"))
    policy = ServicePolicy(max_call_bytes=10_000)
    with router_service(folder, hosts=1, policy=policy) as running:
        yield running


@pytest.fixture(scope="module")
def channel(served: Served) -> Iterator[grpc.Channel]:
    with show_key(grpc.insecure_channel(served.service.address), KEY) as one:
        yield one


@pytest.fixture(autouse=True)
def goes_on(served: Served) -> Iterator[None]:
    yield
    served.goes_on()
    assert served.service._calls._thread.is_alive()


def changed(row: int, column: int, value: float, which: int) -> Inputs:
    """``which`` of x, ids, weights has another value."""
    tensors = [tensor.clone() for tensor in GIVEN]
    tensors[which][row, column] = value
    x, ids, weights = tensors
    return x, ids, weights


def whole(given: Inputs = GIVEN, **changes: Any) -> list[ComputeRequest]:
    return [ComputeRequest(head=head_of(given, **changes), data=data_of(given))]


def status_of(channel: grpc.Channel, requests: Sequence[ComputeRequest]) -> grpc.Call:
    replies = RouterStub(channel).Compute(iter(requests), timeout=20)
    with pytest.raises(grpc.RpcError) as caught:
        list(replies)
    assert isinstance(caught.value, grpc.Call)
    return caught.value


BAD: dict[str, tuple[list[ComputeRequest], type[MoesaicError], str]] = {
    "no message": ([], CallError, "head: the first message"),
    "no head": ([ComputeRequest(data=DATA)], CallError, "head: the first message"),
    "two heads": (whole() + whole(), CallError, "head: only the first message"),
    "no dtype": (whole(dtype=0), CallError, "dtype: 0 is not one of FLOAT32, BFLOAT16, FLOAT16"),
    "unknown dtype": (whole(dtype=9), CallError, "dtype: 9 is not one of"),
    "another dtype": (whole(dtype="FLOAT16"), CallError, "dtype: FLOAT16, but m is computed in"),
    "no model": (
        whole(model=""),
        UnknownModel,
        "model: '' is not served; the router service has m",
    ),
    "unknown model": (
        whole(model="x"),
        UnknownModel,
        "model: 'x' is not served; the router service has m",
    ),
    "layer": (
        whole(layer=99),
        CallError,
        "layer: layer 99 of m has no experts; choose one of layers 0, 1",
    ),
    "no rows": (whole(rows=0), CallError, "rows: 0 is not between 1 and"),
    "too many rows": (whole(rows=2**31), CallError, "rows: 2147483648 is not between"),
    "large": (whole(rows=1000), CallError, "rows: 1000 rows take 144,000 bytes, a call may have"),
    "no hidden": (whole(hidden=0), CallError, "hidden: 0 is not between"),
    "wide": (whole(hidden=MAX_HIDDEN + 1), CallError, "hidden: 131073 is not between"),
    "hidden": (whole(hidden=31), CallError, "hidden: 31, but m has 32"),
    "no assignments": (whole(top_k=0), CallError, "top_k: 0 is not between"),
    "assignments": (whole(top_k=9), CallError, "top_k: 9 assignments of 8 experts"),
    "too little": (
        [ComputeRequest(head=head_of(GIVEN), data=DATA[:-1])],
        CallError,
        "data: 576 bytes were announced, but only 575 have arrived",
    ),
    "too much": (
        [ComputeRequest(head=head_of(GIVEN), data=DATA), ComputeRequest(data=b"x")],
        CallError,
        "data: 576 bytes were announced, but 577 have arrived",
    ),
    "changed": (whole(crc32=1), Corrupted, "crc32: the tensors have"),
    "id": (whole(changed(2, 1, 9, 1)), CallError, "ids: row 2 has 9; layer 1 of m has"),
    "negative id": (whole(changed(3, 0, -2, 1)), CallError, "ids: row 3 has -2"),
    "hidden nan": (whole(changed(1, 5, torch.nan, 0)), CallError, "hidden: row 1 has a value"),
    "hidden inf": (whole(changed(0, 5, torch.inf, 0)), CallError, "hidden: row 0 has a value"),
    "weight": (whole(changed(3, 0, -torch.inf, 2)), CallError, "weights: row 3 has a value"),
}


@pytest.mark.parametrize("name", BAD)
def test_each_mistake_has_its_error(channel: grpc.Channel, name: str) -> None:
    requests, kind, words = BAD[name]
    failed = status_of(channel, requests)
    assert failed.code() is STATUS[kind]
    error = from_grpc(failed, "service")  # pyright: ignore[reportArgumentType]
    assert type(error) is kind
    assert words in str(error)


def test_a_good_call_in_many_messages_is_a_good_call(served: Served, channel: grpc.Channel) -> None:
    requests = [ComputeRequest(head=head_of(GIVEN))]
    requests += [ComputeRequest(data=DATA[at : at + 7]) for at in range(0, len(DATA), 7)]
    requests.insert(5, ComputeRequest())
    replies: list[ComputeReply] = list(RouterStub(channel).Compute(iter(requests), timeout=20))
    answer = torch.frombuffer(
        bytearray(b"".join(reply.data for reply in replies)), dtype=torch.float32
    )
    torch.testing.assert_close(answer.view(4, HIDDEN), served.pool.answer(*GIVEN))


ARRAYS = GIVEN[0].numpy(), GIVEN[1].numpy(), GIVEN[2].numpy()


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, ARRAYS[0].astype(np.float64), "hidden: an array of numpy's float64"),
        (0, GIVEN[0].double(), "hidden: a tensor of torch's float64"),
        (0, ARRAYS[0][0], r"hidden: the shape is \(32,\)"),
        (0, ARRAYS[0][:, :-1], "hidden: 31, but m has 32"),
        (1, ARRAYS[1].astype(np.float32), "ids: the array has dtype float32; give integers"),
        (1, GIVEN[1].bool(), "ids: the array has dtype bool; give integers"),
        (1, ARRAYS[1] + 2**40, "ids: an expert's number does not fit"),
        (1, ARRAYS[1][:3], r"ids: the shape is \(3, 2\) for 4 tokens"),
        (1, ARRAYS[1][:, 0], r"ids: the shape is \(4,\) for 4 tokens"),
        (2, ARRAYS[2][:, :1], r"weights: the shape is \(4, 1\) for 4 tokens"),
        (2, ARRAYS[2].astype(np.complex64), "weights: the array has dtype complex64; give real"),
        (2, [["a", "b"]] * 4, "weights: the array has dtype <?U?s?t?r?.*; give real"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    served: Served, place: int, value: Any, words: str
) -> None:
    given: list[Any] = list(ARRAYS)
    given[place] = value
    with pytest.raises(CallError, match=words):
        served.client().experts("m", LAYER)(*given)


def test_fuzzed_bytes_end_in_an_error(channel: grpc.Channel) -> None:
    dice = random.Random(4)
    compute = channel.stream_stream(f"/{SERVICE}/Compute")  # bytes, as they are
    good = whole()[0].SerializeToString()
    answered = 0
    for _ in range(150):
        message = bytearray(good)
        for _ in range(dice.randint(1, 8)):
            match dice.randrange(3):
                case 0:
                    message[dice.randrange(len(message))] = dice.randrange(256)
                case 1:
                    del message[dice.randrange(len(message)) :]
                    message += dice.randbytes(dice.randrange(1, 9))
                case _:
                    at = dice.randrange(len(message))
                    message[at:at] = dice.randbytes(dice.randrange(1, 5))
        try:
            list(compute(iter([bytes(message)]), timeout=20))
            answered += 1  # some other field, that nobody reads
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            if error.details() != "Exception deserializing request!":  # gRPC's own words
                ours = from_grpc(error, "service")  # pyright: ignore[reportArgumentType]
                assert isinstance(ours, BadInput | Corrupted), ours
    assert answered < 15
