"""Named tensors as the bytes of one safetensors file in memory.

The format is a header of JSON with each tensor's dtype, shape and place, after the header's length,
and then the bytes of the tensors (https://huggingface.co/docs/safetensors). Safetensors' own
functions copy all tensors, both ways. Here they are written once, to where they are to lie, and
read in place.

The other side of a transfer may change shared memory while it is read. So a header is copied before
anything in it is checked, and its numbers must account for every byte that there is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...kernels.slabs.checksum import octets_of
from ...models.folder.files import DTYPES
from ...proto.errors import CallError
from ...proto.wire import ALIGNMENT_BYTES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 16 << 20
# Bytes that are copied and hashed at once: few enough to be in a core's cache for the second.
# Between two such steps another thread of this process can run Python.
_STEP_BYTES = 512 << 10


class Digest(Protocol):
    """What computes a checksum of `xxhash`."""

    def update(self, data: memoryview, /) -> None: ...


class TensorBytes:
    """The bytes of tensors, which are made only when they are written somewhere."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors that do not change until they are written.

        Raises CallError for a dtype that safetensors lacks.
        """
        header: dict[str, object] = {}
        self._tensors: list[Tensor] = []
        end = 0
        # Wide dtypes come first, so that each tensor is aligned.
        for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
            tensor = tensors[name]
            if tensor.dtype not in _NAMES:
                raise CallError(f"{name}: {tensor.dtype} is not one of {', '.join(DTYPES)}")
            begin, end = end, end + tensor.nbytes
            header[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
            self._tensors.append(tensor.detach())
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(_LENGTH_BYTES + len(text)) % ALIGNMENT_BYTES)
        self._header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
        self.nbytes = len(self._header) + end

    def write(self, memory: np.ndarray, digest: Digest | None = None) -> Iterator[int]:
        """Write all bytes into ``memory`` (uint8), and into ``digest`` if there is one.

        Say after each step how many bytes are written.
        """
        at = 0
        for part in self._parts():
            for start in range(0, len(part), _STEP_BYTES):
                step = part[start : start + _STEP_BYTES]
                memory[at : at + len(step)] = step
                if digest is not None:
                    digest.update(step.data)
                at += len(step)
                yield at

    def _parts(self) -> Iterator[np.ndarray]:
        yield np.frombuffer(self._header, np.uint8)
        for tensor in self._tensors:
            yield octets_of(tensor)


def new_memory(nbytes: int) -> np.ndarray:
    """Return memory for the bytes of tensors, with the alignment that their kernels like.

    numpy asks Linux for huge pages if it is large, and torch does not: without them half of the
    time of a transfer would go into page faults.
    """
    whole = np.empty(nbytes + ALIGNMENT_BYTES, np.uint8)
    start = -whole.ctypes.data % ALIGNMENT_BYTES
    return whole[start : start + nbytes]


def tensors_in(octets: np.ndarray) -> dict[str, Tensor]:
    """View the tensors whose bytes (uint8) are ``octets``, all of them.

    They lie in that memory, which stays as long as one of them does. Raises CallError if the bytes
    are not a safetensors file.
    """
    size = int.from_bytes(octets[:_LENGTH_BYTES].tobytes(), "little")
    data_bytes = len(octets) - _LENGTH_BYTES - size
    if len(octets) < _LENGTH_BYTES or size > _MAX_HEADER_BYTES or data_bytes < 0:
        raise CallError(
            f"safetensors: {len(octets)} bytes are too few for a header of {size}, or "
            f"this is more than {_MAX_HEADER_BYTES}"
        )
    text = octets[_LENGTH_BYTES : _LENGTH_BYTES + size].tobytes()
    data = torch.from_numpy(octets)[_LENGTH_BYTES + size :]
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CallError(f"safetensors: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CallError("safetensors: the header is not a JSON object")
    found = {name: _entry(name, about) for name, about in header.items()}
    end = 0
    tensors: dict[str, Tensor] = {}
    for name, (dtype, shape, (begin, stop)) in sorted(found.items(), key=lambda one: one[1][2]):
        # Each byte belongs to one tensor: so a tensor has its own, and no name comes twice.
        if begin != end or stop - begin != math.prod(shape) * dtype.itemsize or stop > data_bytes:
            raise CallError(
                f"safetensors: {name} is {dtype} {shape} at bytes {begin} to {stop}, after "
                f"{end} and of {data_bytes} bytes"
            )
        part = data[begin:stop]
        if part.data_ptr() % dtype.itemsize:
            part = part.clone()  # torch views aligned memory only
        tensors[name] = part.view(dtype).view(shape)
        end = stop
    if end != data_bytes:
        raise CallError(f"safetensors: {data_bytes} bytes follow the header, which names {end}")
    return tensors


def _entry(name: str, about: object) -> tuple[torch.dtype, tuple[int, ...], tuple[int, int]]:
    """Return (dtype, shape, first byte and the one after the last) of a header's entry."""
    match about:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            if dtype in DTYPES and all(type(size) is int and 0 <= size < 1 << 48 for size in shape):
                return DTYPES[dtype], tuple(shape), (begin, end)
    raise CallError(f"safetensors: the header's entry of {name} is not one: {str(about)[:200]}")
