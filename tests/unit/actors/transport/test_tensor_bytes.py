"""Tensors as the bytes of a safetensors file: written once, read in place; no lie is believed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch
import xxhash
from torch import Tensor

from moesaic.actors.transport.tensor_bytes import TensorBytes, new_memory, tensors_in
from moesaic.kernels.slabs.checksum import copy_and_digest
from moesaic.proto.errors import CallError

KINDS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "dtypes": {
        str(dtype): torch.arange(6).view(2, 3).to(dtype)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64)
    },
    "odd sizes": {"a": torch.ones(3).bfloat16(), "b": torch.ones(5), "c": torch.ones(1).bool()},
    "no elements": {"empty": torch.empty(0, 7), "after": torch.ones(2), "flat": torch.empty(0)},
    "scalars": {"step": torch.tensor(7.0), "count": torch.tensor(3)},
    "views": {"t": torch.randn(4, 6).t(), "row": torch.randn(3, 5)[:, 1]},
    "larger than a step": {"up": torch.randn(400, 1000), "down": torch.randn(700, 601)},
    "names": {"layers.0.mlp.é": torch.ones(2), "": torch.ones(1)},
}


def written(tensors: dict[str, Tensor]) -> np.ndarray:
    file = TensorBytes(tensors)
    octets = new_memory(file.nbytes)
    assert list(file.write(octets))[-1] == file.nbytes
    return octets


def same(given: dict[str, Tensor], got: dict[str, Tensor]) -> bool:
    return given.keys() == got.keys() and all(
        torch.equal(given[name], got[name])
        and given[name].dtype == got[name].dtype
        and given[name].shape == got[name].shape
        for name in given
    )


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str) -> None:
    assert same(KINDS[kind], tensors_in(written(KINDS[kind])))


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_reads_what_is_written_and_is_read(kind: str) -> None:
    octets = written(KINDS[kind])
    assert same(KINDS[kind], safetensors.torch.load(octets.tobytes()))
    theirs = safetensors.torch.save({n: t.contiguous() for n, t in KINDS[kind].items()})
    assert same(KINDS[kind], tensors_in(np.frombuffer(bytearray(theirs), np.uint8)))


def test_tensors_lie_in_the_memory_that_they_were_read_from() -> None:
    octets = written({"a": torch.zeros(4), "b": torch.zeros(4)})
    got = tensors_in(octets)
    assert got["a"].data_ptr() % 64 == 0
    octets[-16:] = 255
    assert got["b"].isnan().all()
    assert (got["a"] == 0).all()


def test_the_digest_is_that_of_all_bytes_on_both_sides() -> None:
    file = TensorBytes(KINDS["larger than a step"])
    shared, own = new_memory(file.nbytes), new_memory(file.nbytes)
    digests = xxhash.xxh3_64(), xxhash.xxh3_64()
    ends = list(file.write(shared, digests[0]))
    assert ends == sorted(set(ends))
    for begin, end in ((0, 1_000_000), (1_000_000, file.nbytes)):
        copy_and_digest(shared[begin:end], own[begin:end], digests[1])
    assert (shared == own).all()
    assert {d.intdigest() for d in digests} == {xxhash.xxh3_64_intdigest(shared.data)}


def test_the_size_is_known_without_memory() -> None:
    real = KINDS["larger than a step"]
    assert TensorBytes({n: t.to("meta") for n, t in real.items()}).nbytes == len(written(real))


def test_a_dtype_that_cannot_travel() -> None:
    with pytest.raises(CallError, match=r"z: torch\.complex128 is not one of F64, "):
        TensorBytes({"z": torch.zeros(1, dtype=torch.complex128)})


def file_of(header: object, data: bytes = b"", size: int | None = None) -> np.ndarray:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if size is None else size
    return np.frombuffer(bytearray(length.to_bytes(8, "little") + text + data), np.uint8)


def entry(
    dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)
) -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


TWICE = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},' + (
    b'"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}'
)
LIES: dict[str, tuple[np.ndarray, str]] = {
    "nothing": (np.empty(0, np.uint8), "too few"),
    "half a length": (np.zeros(7, np.uint8), "too few"),
    "a header without end": (file_of({}, size=1 << 20), "too few"),
    "a length beyond all": (file_of({}, size=(1 << 64) - 1), "too few"),
    "no JSON": (file_of(b"\xff\xfe"), "not JSON"),
    "deep JSON": (file_of(b"[" * 100_000), "not JSON"),
    "no object": (file_of([1]), "not a JSON object"),
    "no entry": (file_of({"a": 1}), "entry of a"),
    "an unknown dtype": (file_of(entry(dtype="F31"), bytes(8)), "entry of a"),
    "a negative size": (file_of(entry(shape=(-2,)), bytes(8)), "entry of a"),
    "a fraction": (file_of(entry(shape=(2.0,)), bytes(8)), "entry of a"),
    "three offsets": (file_of(entry(offsets=(0, 4, 8)), bytes(8)), "entry of a"),
    "more elements than bytes": (file_of(entry(shape=(3,)), bytes(8)), "a is"),
    "a size that overflows": (file_of(entry(shape=(1 << 40, 1 << 40)), bytes(8)), "a is"),
    "bytes beyond the end": (file_of(entry(), bytes(7)), "a is"),
    "bytes before the beginning": (file_of(entry(offsets=(-8, 0)), bytes(8)), "a is"),
    "a hole": (file_of(entry(offsets=(8, 16)), bytes(16)), "a is"),
    "bytes of nobody": (file_of(entry(), bytes(9)), "names 8"),
    "a name twice": (file_of(TWICE, bytes(8)), "a is"),
    "bytes of two": (
        file_of(entry() | {"b": entry(offsets=(4, 12))["a"]}, bytes(12)),
        "b is",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_is_no_file_is_refused(lie: str) -> None:
    octets, reason = LIES[lie]
    with pytest.raises(CallError, match=reason):
        tensors_in(octets)
