"""Matrix products in 16-bit types, also on CPUs that have no instructions for them.

There torch multiplies number by number: bfloat16 on AVX2 is 6 times slower than float32, and 80
times where the second matrix lies row by row, as in a backward pass (measured). So both are
converted to float32 first, and the result is rounded once.

Shape suffixes: R = rows, I = size of a row, O = size of a row of the result.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear

# With fewer rows, converting a matrix takes longer than multiplying by it.
_ROWS = 8


def multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies float32 or a 16-bit type on this CPU in the type itself."""
    return device.type == "cpu" and _multiplies(dtype)


@cache
def _multiplies(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    match dtype:
        case torch.float32:
            return True
        case torch.bfloat16:
            return torch.ops.mkldnn._is_mkldnn_bf16_supported()
        case torch.float16:
            return torch.ops.mkldnn._is_mkldnn_fp16_supported()
        case _:
            return False


def product(x_RI: Tensor, matrix_IO: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return x @ matrix + bias, (R, O), in the type of all three; sums are taken in a wider one."""
    if not _is_widened(x_RI, matrix_IO):
        return linear(x_RI, matrix_IO.t(), bias_O)
    bias_O = None if bias_O is None else bias_O.float()
    return linear(x_RI.float(), matrix_IO.float().t(), bias_O).to(x_RI.dtype)


def _is_widened(x_RI: Tensor, matrix_IO: Tensor) -> bool:
    if x_RI.dtype not in (torch.bfloat16, torch.float16) or x_RI.device.type != "cpu":
        return False
    few = x_RI.shape[0] < _ROWS and matrix_IO.stride(0) == 1
    return not few and not _multiplies(x_RI.dtype)
