"""Quantised checkpoints, read as if they had never been quantised.

`stored_tensors` gives the tensors of a folder the names and shapes that the same model has in plain
floats. Each tensor is dequantised when it is read: value times scale in float32, which holds the
product of MXFP4 exactly and rounds that of FP8 once. Published formats:

- `mxfp4` (gpt-oss): X_blocks uint8 (E, R, G, 16) and X_scales uint8 (E, R, G) are X (E, 32 G, R).
  Elements are FP4 E2M1, two in a byte, the first one in the low half. 32 elements of a row share a
  scale E8M0, which is 2 ** (byte - 127); 255 is not a number. OCP Microscaling Formats (MX)
  specification v1.0: v_i = X * P_i, MXFP4 with its element format FP4 and its scale format E8M0.
- `fp8` (DeepSeek-V3, Qwen3-FP8, GLM-FP8, MiniMax-M2, ...): X.weight float8_e4m3fn (R, C), and one
  scale for each block of r x c, X.weight_scale_inv (R / r, C / c) rounded up, because the last
  blocks of rows and columns may be partial. DeepSeek-V3 Technical Report (arXiv 2412.19437),
  section 3.3, and `weight_dequant` of its published inference code: y = x * s, which despite the
  name is a product. Without `weight_block_size` the shape of the scales, X.weight_scale or
  X.weight_scale_inv, says what they are for: one for the whole tensor, one for each expert of a
  fused tensor, or one for each row.
- `compressed-tensors` in its format `float-quantized`: the same under X.weight_scale, with the
  strategy `tensor`, `channel` (one scale for each row) or `block`.
- `fp8` with experts in MXFP4 (DeepSeek-V4): X.weight int8 (R, C / 2) and X.scale E8M0 (R, C / 32).

Tensors without scales are plain, so `modules_to_not_convert` and `ignore` are not needed.
Activations and caches are never quantised, and their scales are not read.

Shape suffixes: R = rows, C = columns, G = groups of 32 columns; "..." = experts, or nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ...proto.errors import CheckpointError, UnsupportedModel
from .files import Header, read_tensor

# The value of FP4 E2M1 for its 4 bits: a sign, two of exponent (bias 1), one of mantissa.
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
# The two elements of each byte, low half first, (256, 2).
_E2M1_PAIRS = torch.stack([_E2M1.repeat(16), _E2M1.repeat_interleave(16)], dim=1)
_GROUP = 32  # elements of an MX block

_E8M0 = (torch.uint8, torch.float8_e8m0fnu)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FP8 = {
    "e4m3": torch.float8_e4m3fn,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "float8_e5m2": torch.float8_e5m2,
}
# Values of these dtypes mean something only together with scales.
CODES = frozenset(
    {
        torch.uint8,
        torch.int8,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
        torch.float4_e2m1fn_x2,
    }
)
# Scales of activations, and of cached keys and values.
_NOT_OF_WEIGHTS = (
    *(".input_scale", ".activation_scale", ".output_scale"),
    *(".q_scale", ".k_scale", ".v_scale", ".kv_scale", ".prob_scale"),
)
# Fields of config.json that describe the quantisation; the second is compressed-tensors' older
# name, the third is MLX's.
FIELDS = ("quantization_config", "compression_config", "quantization")
# Formats of compressed-tensors that are float8 with scales.
_FLOAT_QUANTIZED = ("float-quantized", "naive-quantized")


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How a checkpoint's weights were quantised."""

    method: Literal["mxfp4", "fp8", "compressed-tensors"]
    # Rows and columns of an FP8 matrix that share a scale; None: see the scales' shapes.
    block: tuple[int, int] | None = None
    dtype: torch.dtype = torch.float8_e4m3fn  # of FP8 matrices

    def __str__(self) -> str:
        if self.method == "mxfp4":
            return "mxfp4"
        name = "fp8" if self.dtype == torch.float8_e4m3fn else "fp8 e5m2"
        name += " of compressed-tensors" if self.method == "compressed-tensors" else ""
        return f"{name}, blocks of {self.block[0]} x {self.block[1]}" if self.block else name


def quantisation_of(config: PretrainedConfig, path: Path) -> Quantisation | None:
    """Return how the weights of folder ``path`` are quantised; None if they are plain floats.

    Raises UnsupportedModel for methods and formats that are not read, and CheckpointError for an
    invalid block size.
    """
    for part in (config, config.get_text_config()):
        for name in FIELDS:
            values: Any = getattr(part, name, None)
            if values:
                return _declared(f"{path}/config.json: {name}", values, name)
    return None


def _declared(field: str, values: Any, name: str) -> Quantisation:
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{field}: {values!r} is not a mapping")
    method = values.get("quant_method")
    if method is None and (name == "quantization" or {"bits", "group_size"} <= values.keys()):
        raise UnsupportedModel(
            f"{field}: {values.get('bits')!r} bits in groups, as MLX quantises, is not supported; "
            "give the model quantised with 'mxfp4' or 'fp8', or in float32, bfloat16 or float16"
        )
    if method == "mxfp4":
        return Quantisation("mxfp4")
    if method == "compressed-tensors":
        return _compressed(field, values)
    if method != "fp8":
        raise UnsupportedModel(
            f"{field}.quant_method: {method!r} is not supported; give the model quantised with "
            "'mxfp4', 'fp8' or compressed-tensors' 'float-quantized', or in float32, bfloat16 or "
            "float16"
        )
    kind = values.get("fmt") or "e4m3"
    if not isinstance(kind, str) or kind not in _FP8:
        raise UnsupportedModel(f"{field}.fmt: {kind!r} is not supported; 'e4m3' and 'e5m2' are")
    block = values.get("weight_block_size")
    where = f"{field}.weight_block_size"
    return Quantisation("fp8", block if block is None else _block(where, block), _FP8[kind])


def _block(field: str, block: Any) -> tuple[int, int]:
    if (
        not isinstance(block, (list, tuple))
        or len(block) != 2
        or not all(type(size) is int and size > 0 for size in block)
    ):
        raise CheckpointError(f"{field}: {block!r} is not two positive numbers, rows and columns")
    return block[0], block[1]


def _compressed(field: str, values: Mapping[str, Any]) -> Quantisation:
    """Read a configuration of compressed-tensors.

    Each of its ``config_groups`` says how the weights of its targets were quantised, and may have a
    format of its own. Models that combine several ways are refused.
    """
    groups = values.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(isinstance(g, Mapping) for g in groups.values()):
        raise CheckpointError(f"{field}.config_groups: {groups!r} is not a mapping of mappings")
    found: set[tuple[int, int] | None] = set()
    for name, group in groups.items():
        where = f"{field}.config_groups.{name}"
        weights = group.get("weights")
        if weights is None:
            continue
        kind = group.get("format") or values.get("format")
        _refuse_other(f"{where}.format", kind, _FLOAT_QUANTIZED)
        _refuse_other(f"{where}.weights.type", weights.get("type"), ("float",))
        _refuse_other(f"{where}.weights.num_bits", weights.get("num_bits"), (8,))
        strategy = weights.get("strategy") or "tensor"
        _refuse_other(f"{where}.weights.strategy", strategy, ("tensor", "channel", "block"))
        if strategy == "block":
            found.add(_block(f"{where}.weights.block_structure", weights.get("block_structure")))
        else:
            found.add(None)
    if not groups:
        _refuse_other(f"{field}.format", values.get("format"), _FLOAT_QUANTIZED)
    for other in ("sparsity_config", "transform_config"):
        more = values.get(other) or {}
        if more and not (isinstance(more, Mapping) and more.get("format") == "dense"):
            raise UnsupportedModel(
                f"{field}.{other}: {more!r} is not supported: weights that are sparse or "
                "transformed cannot be read; give a checkpoint of the model without it"
            )
    if len(found) > 1:
        raise UnsupportedModel(
            f"{field}.config_groups: the groups have different strategies or block sizes; only "
            "checkpoints whose groups all have the same can be read"
        )
    return Quantisation("compressed-tensors", found.pop() if found else None)


def _refuse_other(field: str, value: Any, read: tuple[Any, ...]) -> None:
    if value not in read:
        one = " and ".join(repr(each) for each in read)
        raise UnsupportedModel(
            f"{field}: {value!r} of compressed-tensors is not supported; {one} "
            f"{'is' if len(read) == 1 else 'are'}"
        )


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a folder, dequantised when it is read."""

    values: Header
    quantisation: Quantisation | None
    scales: Header | None

    @property
    def file(self) -> Path:
        return self.values.file

    @property
    def key(self) -> str:
        """The name of its values on disk."""
        return self.values.key

    @property
    def dtype(self) -> torch.dtype:
        """The dtype as it is read."""
        return self.values.dtype if self.scales is None else torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as it is read. Raises CheckpointError if values and scales do not fit."""
        shape = self.values.shape
        if self.scales is None or self.quantisation is None:
            return shape
        wanted = self._wanted_scales()
        if self.quantisation.method == "mxfp4":
            *experts, rows, groups = wanted
            return (*experts, groups * _GROUP, rows)
        return (*shape[:-1], 2 * shape[-1]) if self.values.dtype == torch.int8 else shape

    def __getitem__(self, _: EllipsisType) -> Tensor:
        """Read all of it; this is how transformers reads lazy tensors of a state dict."""
        return self.read()

    def read(self, expert: int | None = None, rows: int = 1) -> Tensor:
        """Read the whole tensor, or the ``rows`` rows of one expert in a fused one.

        The result is float32 if the tensor was quantised, and else as on disk. Raises
        CheckpointError.
        """
        if self.scales is None or self.quantisation is None:
            if self.quantisation is not None and self.values.dtype in CODES:
                raise self._error(f"is {self.values.dtype} but has no scales")
            return read_tensor(self.file, self.key, expert, rows)
        wanted = self._wanted_scales()
        if rows != 1 and (self.quantisation.block or self.values.dtype != self.quantisation.dtype):
            raise self._error(
                "is quantised and has many rows for each expert, which is not supported"
            )
        values = read_tensor(self.file, self.key, expert, rows)
        scales = self._read_scales(wanted, expert, rows)
        if self.quantisation.method == "mxfp4":
            plain = self._from_groups(values, scales).transpose(-1, -2)
        elif values.dtype == torch.int8:
            packed = values.view(torch.uint8).unflatten(-1, (-1, _GROUP // 2))
            plain = self._from_groups(packed, scales)
        elif self.quantisation.block:
            plain = self._from_blocks(values, scales, *self.quantisation.block)
        else:
            plain = values.to(torch.float32).mul_(scales)
        # The bounds show values that are not finite, in one pass and without a copy.
        if plain.numel() and not torch.stack(plain.aminmax()).isfinite().all():
            raise self._error("holds values that are not finite")
        return plain

    def _read_scales(self, wanted: tuple[int, ...], expert: int | None, rows: int) -> Tensor:
        """Read the scales of the values as float32, in shape ``wanted`` or the expert's part."""
        assert self.scales is not None
        if expert is None or wanted[0] == 1:
            scales = read_tensor(self.scales.file, self.scales.key)
        else:
            scales = read_tensor(self.scales.file, self.scales.key, expert, rows)
            wanted = (rows, *wanted[1:])
        if scales.dtype in _E8M0:
            scales = scales.view(torch.float8_e8m0fnu)
        factors = scales.to(torch.float32).reshape(wanted)
        if not factors.isfinite().all():
            raise CheckpointError(
                f"{self.scales.file}: {self.scales.key} holds a scale that is not a finite number"
            )
        return factors

    def _wanted_scales(self) -> tuple[int, ...]:
        """Return the shape that the scales must have for these values, by both headers.

        For FP8 without blocks it is any shape that broadcasts to the values as intended.
        """
        assert self.scales is not None and self.quantisation is not None
        dtype, scales = self.values.dtype, self.scales.shape
        shape: Any = self.values.shape
        fp4 = self.quantisation.method == "mxfp4"
        if fp4 and (dtype != torch.uint8 or len(shape) < 3 or shape[-1] * 2 != _GROUP):
            raise self._error(f"is {self.values} instead of uint8 (..., rows, groups, 16)")
        fp4_pairs = dtype == torch.int8 and len(shape) > 1 and shape[-1] % 16 == 0
        # With float scales an int8 is a number of its own, not a pair of FP4.
        fp4_pairs = fp4_pairs and self.scales.dtype in _E8M0
        if not fp4 and not fp4_pairs and (dtype != self.quantisation.dtype or len(shape) < 2):
            raise self._error(
                f"is {self.values} instead of a {self.quantisation.dtype} matrix, or a torch.int8 "
                f"one of FP4 pairs with scales E8M0, though it has scales of {self.scales.dtype} "
                f"({self.scales.key})"
            )
        kinds = _E8M0 if fp4 or fp4_pairs else (*_E8M0, *_FLOATS)
        if self.scales.dtype not in kinds:
            words = "E8M0 (torch.uint8)" if kinds == _E8M0 else "floats or E8M0"
            raise self._error(f"has scales of {self.scales.dtype} instead of {words}")
        if fp4:
            allowed = [shape[:-1]]
        elif fp4_pairs:
            *start, pairs = shape
            allowed = [(*start, pairs * 2 // _GROUP)]
        elif self.quantisation.block:
            r, c = self.quantisation.block
            *experts, rows, columns = shape
            allowed = [(*experts, -(-rows // r), -(-columns // c))]
        else:
            allowed = _broadcast(shape)
            # Some publish scales without trailing dimensions of 1: (), (1,), (R,), (E,), (E, R).
            fits = [one for one in allowed if _trimmed(one) == _trimmed(scales)]
            return fits[0] if fits else self._refuse(allowed)
        return scales if scales in allowed else self._refuse(allowed)

    def _refuse(self, allowed: list[tuple[int, ...]]) -> tuple[int, ...]:
        assert self.scales is not None
        raise CheckpointError(
            f"{self.scales.file}: {self.scales.key} has shape {self.scales.shape}, {self.key} "
            f"needs {' or '.join(map(str, dict.fromkeys(allowed)))}"
        )

    @staticmethod
    def _from_groups(pairs: Tensor, factors: Tensor) -> Tensor:
        """Multiply (..., R, G, 16) uint8 by scales (..., R, G), which gives (..., R, 32 G)."""
        values = _E2M1_PAIRS.index_select(0, pairs.flatten().int())  # (R * G * 16, 2)
        return values.view(*factors.shape, _GROUP).mul_(factors.unsqueeze(-1)).flatten(-2)

    @staticmethod
    def _from_blocks(codes: Tensor, factors: Tensor, r: int, c: int) -> Tensor:
        """Multiply (..., R, C) FP8 by scales (..., R / r, C / c) rounded up."""
        factors = factors.repeat_interleave(c, dim=-1)[..., : codes.shape[-1]]
        values = codes.to(torch.float32)
        for block, factor in zip(values.split(r, -2), factors.split(1, -2), strict=True):
            block.mul_(factor)
        return values

    def _error(self, words: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {self.key} {words}")


def _broadcast(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the shapes of scales for (..., R, C): for all, by expert, by row, and by column.

    By column is for fused experts that are stored transposed.
    """
    *experts, rows, columns = shape
    ones = [1] * len(experts)
    found = [(*ones, 1, 1), (*experts, 1, 1), (*experts, rows, 1)]
    return [*found, (*experts, 1, columns)] if experts else found


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Remove trailing dimensions of 1."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def stored_tensors(
    headers: Mapping[str, Header], quantisation: Quantisation | None
) -> dict[str, StoredTensor]:
    """Return {name: tensor}, with the names that an unquantised checkpoint has for the tensors.

    Each tensor still has its stored form, and is dequantised when it is read.

    If the configuration says that weights are quantised, scales of activations and of caches are
    left out.
    """
    if quantisation is None:
        return {key: StoredTensor(header, None, None) for key, header in headers.items()}
    # values -> their scales
    scales: dict[str, str] = {}
    for key, header in headers.items():
        if header.dtype in CODES:
            name = next((one for one in _scale_names(key, quantisation) if one in headers), None)
            if name is not None:
                scales[key] = name
    taken = set(scales.values())
    mxfp4 = quantisation.method == "mxfp4"
    found: dict[str, StoredTensor] = {}
    for key, header in headers.items():
        name = key.removesuffix("_blocks") if mxfp4 else key
        if name not in taken and (mxfp4 or not name.endswith(_NOT_OF_WEIGHTS)):
            theirs = headers[scales[key]] if key in scales else None
            found[name] = StoredTensor(header, quantisation, theirs)
    return found


def _scale_names(key: str, quantisation: Quantisation) -> Iterator[str]:
    if quantisation.method == "mxfp4":
        if key.endswith("_blocks"):
            yield f"{key.removesuffix('_blocks')}_scales"
        return
    yield f"{key}_scale_inv"
    yield f"{key}_scale"
    if key.endswith(".weight"):
        yield f"{key.removesuffix('weight')}scale"


def forget(config: PretrainedConfig) -> None:
    """Remove all fields about quantisation from ``config``."""
    for part in (config, config.get_text_config()):
        for name in FIELDS:
            vars(part).pop(name, None)
