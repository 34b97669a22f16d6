"""oneDNN's packed matrices, which may lie in any memory.

oneDNN multiplies fastest by a matrix in a layout of its own, which depends on the shape, the dtype
and the CPU. torch makes such tensors in memory of their own. `view` makes one over bytes that lie
elsewhere, in shared memory for example, with the descriptor that torch serialises for compiled
models. The names of torch that this file uses are private; `available` tries them once.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_MKLDNN_LAYOUT = 3  # in torch/csrc/inductor/aoti_torch/c/shim.h
_CPU = 0


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """How oneDNN lays a matrix of ``shape`` and ``dtype`` out on this CPU."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    descriptor: bytes

    @classmethod
    def of(cls, packed: Tensor) -> PackedMatrix:
        described = torch.ops.mkldnn._get_mkldnn_serialized_md(packed)
        return cls(
            tuple(packed.shape),
            packed.dtype,
            int(torch.ops.mkldnn._nbytes(packed)),
            described.numpy().tobytes(),
        )


def pack(matrix: Tensor) -> Tensor:
    """Return the matrix in oneDNN's layout, in memory of its own."""
    return torch.ops.mkldnn._reorder_linear_weight(matrix, 1)


def copy_into(memory: Tensor, packed: Tensor) -> None:
    """Copy the bytes of a packed matrix to ``memory``, which is contiguous uint8 of their size."""
    size = int(torch.ops.mkldnn._nbytes(packed))
    if memory.numel() != size or memory.dtype != torch.uint8 or not memory.is_contiguous():
        raise ValueError(
            f"memory: {memory.numel()} elements of {memory.dtype} do not fit the matrix, which has "
            f"{size} bytes"
        )
    ctypes.memmove(memory.data_ptr(), torch.ops.mkldnn.data_ptr(packed), size)


def view(memory: Tensor, matrix: PackedMatrix) -> Tensor:
    """Return the packed matrix whose bytes are ``memory``, which must live longer than it."""
    library, new_capsule = _library()
    rows, columns = matrix.shape
    handle = ctypes.c_void_p()
    failed = library.aoti_torch_create_tensor_from_blob_v2(
        ctypes.c_void_p(memory.data_ptr()),
        ctypes.c_int64(2),
        (ctypes.c_int64 * 2)(rows, columns),
        (ctypes.c_int64 * 2)(columns, 1),
        ctypes.c_int64(0),
        ctypes.c_int32(_code(library, matrix.dtype)),
        ctypes.c_int32(_CPU),
        ctypes.c_int32(0),
        ctypes.byref(handle),
        ctypes.c_int32(_MKLDNN_LAYOUT),
        matrix.descriptor,
        ctypes.c_int64(len(matrix.descriptor)),
    )
    if failed:
        raise RuntimeError(
            f"torch cannot make a packed tensor of shape {matrix.shape} and {matrix.dtype}"
        )
    aoti = torch._C._aoti  # pyright: ignore[reportAttributeAccessIssue]
    return aoti.alloc_tensor_by_stealing_from_void_ptr(new_capsule(handle.value, None, None))


@cache
def available() -> bool:
    """Return whether `view` works with this torch, and its products have the same bits."""
    if not torch.backends.mkldnn.is_available():
        return False
    drawn = torch.Generator().manual_seed(0)
    plain, x_RH = (torch.randn(rows, 48, generator=drawn) for rows in (64, 5))
    try:
        packed = pack(plain)
        matrix = PackedMatrix.of(packed)
        memory = torch.empty(matrix.nbytes, dtype=torch.uint8)
        copy_into(memory, packed)
        products = [
            torch.ops.mkldnn._linear_pointwise(x_RH, one, None, "none", [], "")
            for one in (packed, view(memory, matrix))
        ]
    except (AttributeError, RuntimeError, OSError, TypeError) as error:
        log.warning("oneDNN's layout is not used for experts: %s: %s", type(error).__name__, error)
        return False
    return torch.equal(*products)


@cache
def _library() -> tuple[Any, Any]:
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return library, new_capsule


def _code(library: Any, dtype: torch.dtype) -> int:
    """Return torch's number of a dtype."""
    name = str(dtype).removeprefix("torch.")
    return getattr(library, f"aoti_torch_dtype_{name}")()
