"""The values of MXFP4: every byte with every scale."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import MixtralConfig

from moesaic.models.folder import quantised
from moesaic.models.folder.files import SINGLE_FILE, list_tensors
from moesaic.proto.errors import CheckpointError
from tests.helpers.models.quantising import FP4, from_fp4, small_float, to_fp4


def test_fp4_by_hand() -> None:
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert FP4.tolist() == positive + [-value for value in positive]
    assert small_float(0x7E, 4, 3) == 448.0


def read_mxfp4(folder: Path, pairs: Tensor, scales: Tensor) -> Tensor:
    """One matrix (R, G, 16) as it is read."""
    save_file({"x_blocks": pairs, "x_scales": scales}, folder / SINGLE_FILE)
    config = MixtralConfig.from_dict({"quantization_config": {"quant_method": "mxfp4"}})
    quantisation = quantised.quantisation_of(config, folder)
    return quantised.stored_tensors(list_tensors(folder).headers, quantisation)["x"].read()


EVERY_BYTE = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)


@settings(max_examples=60, deadline=None)
@given(scales=st.lists(st.integers(0, 252), min_size=16, max_size=16))
def test_every_byte_with_any_scale(
    tmp_path_factory: pytest.TempPathFactory, scales: list[int]
) -> None:
    """Above 252 the largest element leaves float32."""
    folder = tmp_path_factory.mktemp("m")
    stored = torch.tensor([scales], dtype=torch.uint8)
    found = read_mxfp4(folder, EVERY_BYTE, stored)
    expected = [
        math.ldexp(small_float(code, 2, 1), scales[byte // 16] - 127)
        for byte in range(256)
        for code in (byte & 15, byte >> 4)
    ]
    assert found.shape == (512, 1)
    assert found.flatten().tolist() == expected
    assert found.signbit().flatten().tolist() == [math.copysign(1, v) < 0 for v in expected]
    assert torch.equal(from_fp4(*to_fp4(found.T)), found.T)


@given(scale=st.integers(253, 255))
def test_scales_that_leave_float32(tmp_path_factory: pytest.TempPathFactory, scale: int) -> None:
    folder = tmp_path_factory.mktemp("m")
    words = "x_scales holds a scale" if scale == 255 else "x_blocks holds values"
    with pytest.raises(CheckpointError, match=f"{words}.* not .*finite"):
        read_mxfp4(folder, EVERY_BYTE, torch.full((1, 16), scale, dtype=torch.uint8))
