"""Quantised checkpoints, read as if they had never been quantised.

`stored_tensors` shows the tensors of a folder under the names and in the shapes that the same
model has in plain floats. Each is dequantised when it is read, alone: value times scale in float32,
which holds the product of MXFP4 exactly and rounds that of FP8 once. What is published:

- `mxfp4` (gpt-oss): X_blocks uint8 (E, R, G, 16) and X_scales uint8 (E, R, G) are X (E, 32 G, R).
  Elements are FP4 E2M1, two in a byte, the first one in the low half; 32 of a row share a scale
  E8M0, 2 ** (byte - 127), where 255 is not a number. OCP Microscaling Formats (MX) specification
  v1.0: v_i = X * P_i, MXFP4 with its element format FP4 and its scale format E8M0.
- `fp8` (DeepSeek-V3, Qwen3-FP8, GLM-FP8, MiniMax-M2, ...): X.weight float8_e4m3fn (R, C), and one
  scale for each r x c of it, X.weight_scale_inv (R / r, C / c) rounded up: the last blocks of rows
  and columns may not be full. DeepSeek-V3 Technical Report (arXiv 2412.19437), section 3.3, and
  `weight_dequant` of its published inference code: y = x * s, in spite of the name a product.
  Without `weight_block_size` one scale, X.weight_scale or X.weight_scale_inv, is for all of it.
- `fp8` with experts in MXFP4 (DeepSeek-V4): X.weight int8 (R, C / 2) and X.scale E8M0 (R, C / 32).

Tensors without scales are plain, so `modules_to_not_convert` tells nothing more. Activations are
never quantised.

Shape suffixes: R = rows, C = columns, G = groups of 32 columns; "..." = experts, or nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from ..proto.errors import CheckpointError, UnsupportedModel
from .files import read_tensor, weight_files

# FP4 E2M1 by its 4 bits: sign, two of exponent (bias 1), one of mantissa.
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
# The two elements of each byte, (256, 2).
_E2M1_PAIRS = torch.stack([_E2M1.repeat(16), _E2M1.repeat_interleave(16)], dim=1)
_GROUP = 32  # elements of an MX block

_E8M0 = (torch.uint8, torch.float8_e8m0fnu)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# These mean something only together with scales.
_CODES = (
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)
# Scales of activations.
_ACTIVATIONS = (".input_scale", ".activation_scale")


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How a checkpoint's weights were quantised."""

    method: Literal["mxfp4", "fp8"]
    # Rows and columns of an FP8 matrix that share a scale; None: all of them.
    block: tuple[int, int] | None = None

    def __str__(self) -> str:
        if self.method == "mxfp4":
            return "mxfp4"
        return f"fp8, blocks of {self.block[0]} x {self.block[1]}" if self.block else "fp8"


def quantisation_of(config: PretrainedConfig, path: Path) -> Quantisation | None:
    """What the configuration of folder ``path`` says of its weights; None if they are plain floats.

    Raises UnsupportedModel for methods and formats that are not read, and CheckpointError for a
    block size that is none.
    """
    found = (getattr(c, "quantization_config", None) for c in (config, config.get_text_config()))
    values: Any = next(filter(None, found), None)
    if values is None:
        return None
    field = f"{path}/config.json: quantization_config"
    method = values.get("quant_method")
    if method == "mxfp4":
        return Quantisation("mxfp4")
    if method != "fp8":
        raise UnsupportedModel(
            f"{field}.quant_method: {method!r} is not supported; give the model quantised with "
            "'mxfp4' or 'fp8', or in float32, bfloat16 or float16"
        )
    kind = values.get("fmt") or "e4m3"
    if kind not in ("e4m3", "float8_e4m3fn"):
        raise UnsupportedModel(f"{field}.fmt: {kind!r} is not supported; 'e4m3' is")
    block = values.get("weight_block_size")
    if block is None:
        return Quantisation("fp8")
    if (
        not isinstance(block, (list, tuple))
        or len(block) != 2
        or not all(type(size) is int and size > 0 for size in block)
    ):
        raise CheckpointError(
            f"{field}.weight_block_size: {block!r} is not two positive numbers, rows and columns"
        )
    return Quantisation("fp8", (block[0], block[1]))


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a folder, dequantised when it is read."""

    file: Path
    key: str  # of its values on disk
    quantisation: Quantisation | None
    scales: tuple[Path, str] | None

    def __getitem__(self, _: EllipsisType) -> Tensor:
        """All of it; so transformers reads what a state dict has not read yet."""
        return self.read()

    def read(self, expert: int | None = None, rows: int = 1) -> Tensor:
        """The whole, or the ``rows`` of an expert in one that holds so many for each: float32 if it
        was quantised, else what is on disk. Raises CheckpointError."""
        values = read_tensor(self.file, self.key, expert, rows)
        if self.quantisation is None:
            return values
        if self.scales is not None and rows != 1:
            raise self._error("is quantised, and has many rows for each expert; that is not read")
        if self.scales is None:
            if values.dtype in _CODES:
                raise self._error(f"is {values.dtype}, and has no scales")
            return values
        scales = read_tensor(*self.scales, expert)
        if self.quantisation.method == "mxfp4":
            if values.dtype != torch.uint8 or values.dim() < 3 or values.shape[-1] * 2 != _GROUP:
                raise self._error(f"is {_say(values)} instead of uint8 (..., rows, groups, 16)")
            plain = self._from_groups(values, scales).transpose(-1, -2)
        elif values.dtype == torch.float8_e4m3fn and values.dim() > 1:
            plain = self._from_blocks(values, scales)
        elif values.dtype == torch.int8 and values.dim() > 1 and values.shape[-1] % 16 == 0:
            packed = values.view(torch.uint8).unflatten(-1, (-1, _GROUP // 2))
            plain = self._from_groups(packed, scales)
        else:
            raise self._error(
                f"is {_say(values)} instead of a torch.float8_e4m3fn matrix, or a torch.int8 one "
                f"of FP4 pairs, though it has scales ({self.scales[1]})"
            )
        # Values that are not finite show in the bounds, which are one pass without a copy.
        if plain.numel() and not torch.stack(plain.aminmax()).isfinite().all():
            raise self._error("holds values that are not finite")
        return plain

    def _from_groups(self, pairs: Tensor, scales: Tensor) -> Tensor:
        """(..., R, G, 16) uint8 and (..., R, G) E8M0 -> (..., R, 32 G)."""
        if scales.dtype not in _E8M0:
            raise self._error(f"has scales of {scales.dtype} instead of E8M0 (torch.uint8)")
        factors = self._factors(scales, pairs.shape[:-1])
        values = _E2M1_PAIRS.index_select(0, pairs.flatten().int())  # (R * G * 16, 2)
        return values.view(*factors.shape, _GROUP).mul_(factors.unsqueeze(-1)).flatten(-2)

    def _from_blocks(self, codes: Tensor, scales: Tensor) -> Tensor:
        """(..., R, C) FP8 and (..., R / r, C / c) rounded up, or one scale -> (..., R, C)."""
        *experts, rows, columns = codes.shape
        assert self.quantisation is not None
        r, c = self.quantisation.block or (max(rows, 1), max(columns, 1))
        wanted = torch.Size([*experts, -(-rows // r), -(-columns // c)])
        if self.quantisation.block is None and scales.numel() == wanted.numel():
            scales = scales.reshape(wanted)  # published as (), (1,) and (1, 1)
        factors = self._factors(scales, wanted).repeat_interleave(c, dim=-1)[..., :columns]
        values = codes.to(torch.float32)
        for block, factor in zip(values.split(r, -2), factors.split(1, -2), strict=True):
            block.mul_(factor)
        return values

    def _factors(self, scales: Tensor, shape: torch.Size) -> Tensor:
        """Scales as float32, of the shape that the values need."""
        assert self.scales is not None
        file, key = self.scales
        if scales.shape != shape:
            raise CheckpointError(
                f"{file}: {key} has shape {tuple(scales.shape)}, {self.key} needs {tuple(shape)}"
            )
        if scales.dtype not in (*_E8M0, *_FLOATS):
            raise CheckpointError(f"{file}: {key} is {scales.dtype}; scales are floats or E8M0")
        if scales.dtype in _E8M0:
            scales = scales.view(torch.float8_e8m0fnu)
        factors = scales.to(torch.float32)
        if not factors.isfinite().all():
            raise CheckpointError(f"{file}: {key} holds a scale that is not a finite number")
        return factors

    def _error(self, words: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {self.key} {words}")


def stored_tensors(path: Path, config: PretrainedConfig) -> dict[str, StoredTensor]:
    """{name in a plain checkpoint: tensor} of a folder whose files are whole. Reads no tensor.

    Raises CheckpointError and UnsupportedModel.
    """
    files, quantisation = weight_files(path), quantisation_of(config, path)
    found = {}
    for name, (key, scales) in _pairs(files.keys(), quantisation).items():
        where = None if scales is None else (path / files[scales], scales)
        found[name] = StoredTensor(path / files[key], key, quantisation, where)
    return found


def pretrained(path: Path, config: PretrainedConfig) -> dict[str, Any]:
    """What `from_pretrained` needs to find the weights of folder ``path`` as plain floats.

    transformers' own way is not taken for quantised ones: where there is a GPU it keeps them as
    they are, and it knows no blocks that are not full. It gets tensors that are dequantised one by
    one as it asks for them, and ``config`` says nothing of quantisation any more.
    """
    if quantisation_of(config, path) is None:
        return {"pretrained_model_name_or_path": path}
    tensors = stored_tensors(path, config)
    for part in (config, config.get_text_config()):
        vars(part).pop("quantization_config", None)
    generation = (path / "generation_config.json").is_file()
    return {
        "pretrained_model_name_or_path": None,
        "state_dict": tensors,
        "generation_config": GenerationConfig.from_pretrained(path) if generation else None,
    }


def _pairs(
    keys: Collection[str], quantisation: Quantisation | None
) -> dict[str, tuple[str, str | None]]:
    """{name: (its values on disk, their scales)}, of names on disk."""
    if quantisation is None:
        return {key: (key, None) for key in keys}
    pairs: dict[str, tuple[str, str | None]] = {}
    for key in keys:
        name = key
        if quantisation.method == "mxfp4":
            name = key.removesuffix("_blocks")
            candidates = [f"{name}_scales"] if name != key else []
        else:
            candidates = [f"{key}_scale_inv", f"{key}_scale"]
            if key.endswith(".weight"):
                candidates.append(f"{key.removesuffix('weight')}scale")
        pairs[name] = key, next((scales for scales in candidates if scales in keys), None)
    taken = {scales for _, scales in pairs.values()}
    return {
        name: pair
        for name, pair in pairs.items()
        if name not in taken and not (quantisation.method == "fp8" and name.endswith(_ACTIVATIONS))
    }


def _say(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
