"""A safetensors file whose tensors are written one by one, in any order.

Safetensors' own function wants all tensors of a file at once, and a file may have 50 GB. The format
is a header of JSON with each tensor's dtype, shape and place, and then the bytes of the tensors
(https://huggingface.co/docs/safetensors), so a file whose tensors are known beforehand can be
filled in any order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ...proto.errors import CheckpointError
from ..folder.files import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorFile:
    """A new file with room for ``tensors``, which need no memory (meta device).

    Raises OSError, and FileExistsError if the file exists. The end of a ``with`` block raises
    CheckpointError if not all tensors were written.
    """

    def __init__(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        self.file = file
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._begins: dict[str, int] = {}
        end = 0
        # Wide dtypes come first, so that each tensor is aligned.
        for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
            tensor = tensors[name]
            begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
            header[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
            self._begins[name] = begin
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._left = dict(tensors)
        self._opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            self._write(len(text).to_bytes(8, "little") + text, 0)
        except OSError:
            os.close(self._opened)
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one of the tensors, once.

        Raises OSError, and CheckpointError if it has another dtype or shape.
        """
        wanted = self._left.pop(name)
        if tensor.dtype != wanted.dtype or tensor.shape != wanted.shape:
            raise CheckpointError(
                f"{self.file}: {name} is {tensor.dtype} {tuple(tensor.shape)}, and it should be "
                f"{wanted.dtype} {tuple(wanted.shape)}"
            )
        octets = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._write(octets.numpy().data, self._data + self._begins[name])

    def _write(self, octets: bytes | memoryview, place: int) -> None:
        while len(octets):
            written = os.pwrite(self._opened, octets, place)
            octets, place = octets[written:], place + written

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        os.close(self._opened)
        if kind is None and self._left:
            raise CheckpointError(f"{self.file}: {next(iter(self._left))} was not written")
