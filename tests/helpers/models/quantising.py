"""Checkpoints in published quantised forms, made of small random models.

Quantisers and decoders here are written from the formats' definitions, bit by bit, and share no
line with what they test. Shape suffixes: R = rows, C = columns, G = groups of 32 columns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.helpers.models.architectures import tiny_model
from tests.helpers.models.model_folders import Damage, config

Array = NDArray[np.float32]
Stored = dict[str, Tensor]
# Name of one of FORMS -> a folder in that form, and the model as it is after the rounding.
Form = Callable[[str], tuple[Path, Any]]


def small_float(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """What ``code`` is worth: sign, exponent (bias 2 ** (bits - 1) - 1), mantissa, subnormals."""
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    fraction = (code & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    bias = (1 << exponent_bits - 1) - 1
    if exponent == 0:
        return sign * fraction * 2.0 ** (1 - bias)
    return sign * (1.0 + fraction) * 2.0 ** (exponent - bias)


FP4: Array = np.array([small_float(code, 2, 1) for code in range(16)], np.float32)
FP8: Array = np.array([small_float(code, 4, 3) for code in range(256)], np.float32)
FP8[[0x7F, 0xFF]] = np.nan


def power_of_two(bytes_: Tensor) -> Array:
    """Scales E8M0, none of them 255."""
    return np.ldexp(np.float32(1.0), bytes_.numpy().astype(np.int32) - 127)


def to_fp4(plain: Tensor) -> tuple[Tensor, Tensor]:
    """(..., R, 32 G) -> pairs uint8 (..., R, G, 16), the first in the low half, and scales E8M0
    uint8 (..., R, G)."""
    groups = plain.float().unflatten(-1, (-1, 32)).numpy()
    largest = np.abs(groups).max(-1)
    exponent = np.floor(np.log2(np.where(largest > 0, largest, 1.0))).astype(np.int32) - 2
    shrunk = np.ldexp(groups, -exponent[..., None])
    codes = np.abs(shrunk[..., None] - FP4).argmin(-1).astype(np.uint8)
    pairs = codes[..., 0::2] | codes[..., 1::2] << 4
    return torch.from_numpy(pairs), torch.from_numpy((exponent + 127).astype(np.uint8))


def from_fp4(pairs: Tensor, scales: Tensor) -> Tensor:
    """The inverse, float32."""
    codes = np.stack([pairs.numpy() & 15, pairs.numpy() >> 4], axis=-1)
    values = FP4[codes.reshape(*pairs.shape[:-1], 32)] * power_of_two(scales)[..., None]
    return torch.from_numpy(values.reshape(*pairs.shape[:-2], -1))


def to_fp8(
    plain: Tensor, block: tuple[int, int] | None, kind: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(..., R, C) -> float8_e4m3fn alike, and scales of ``kind``: one for each block, or one (())
    if there are none."""
    *_, rows, columns = plain.shape
    r, c = block or (rows, columns)
    scales = torch.empty(*plain.shape[:-2], -(-rows // r), -(-columns // c))
    for i in range(scales.shape[-2]):
        for j in range(scales.shape[-1]):
            part = plain[..., i * r : (i + 1) * r, j * c : (j + 1) * c]
            scales[..., i, j] = part.float().abs().amax((-2, -1)) / 448
    if kind in (torch.uint8, torch.float8_e8m0fnu):
        exponents = (scales.log2().ceil() + 127).to(torch.uint8)
        scales = exponents.view(kind)
        factors = torch.from_numpy(power_of_two(exponents))
    else:
        scales = scales.to(kind) * 2  # no rounding of theirs makes a value too large
        factors = scales.float()
    codes = (plain.float() / spread(factors, r, c, rows, columns)).to(torch.float8_e4m3fn)
    return codes, scales if block else scales.reshape(())


def from_fp8(codes: Tensor, scales: Tensor, block: tuple[int, int] | None) -> Tensor:
    """The inverse, float32."""
    *_, rows, columns = codes.shape
    r, c = block or (rows, columns)
    if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
        factors = torch.from_numpy(power_of_two(scales.view(torch.uint8)))
    else:
        factors = scales.float()
    if block is None:
        factors = factors.reshape(1, 1)
    values = torch.from_numpy(FP8[codes.view(torch.uint8).numpy()])
    return values * spread(factors, r, c, rows, columns)


def spread(factors: Tensor, r: int, c: int, rows: int, columns: int) -> Tensor:
    """Each element's own scale."""
    of_row, of_column = torch.arange(rows) // r, torch.arange(columns) // c
    return factors[..., of_row[:, None], of_column[None, :]]


# Name and tensor on disk -> what a quantised checkpoint has instead, and what that is worth.
Quantise = Callable[[str, Tensor], tuple[Stored, Tensor] | None]


def save_quantised(
    model: Any, folder: Path, quantise: Quantise, config: dict[str, Any], *, files: int = 2
) -> Any:
    """Write ``model`` as ``quantise`` wants it, and return it as plain transformers reads it when
    every weight is what its codes are worth. Scales lie in other files than their values."""
    plain, quantised = folder.with_name(f"{folder.name}-plain"), folder
    model.save_pretrained(plain)
    worth: Stored = {}
    parts: list[Stored] = [{} for _ in range(files)]
    for name, tensor in load_file(plain / "model.safetensors").items():
        changed = quantise(name, tensor)
        # Published trunks are bfloat16 where they are not quantised.
        stored, worth[name] = changed or ({name: tensor.bfloat16()}, tensor.bfloat16())
        for number, (key, part) in enumerate(stored.items()):
            parts[number % files][key] = part.contiguous()
    save_file({k: t.contiguous() for k, t in worth.items()}, plain / "model.safetensors")
    quantised.mkdir()
    index = {}
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        save_file(part, quantised / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    described = {"metadata": {}, "weight_map": index}
    (quantised / "model.safetensors.index.json").write_text(json.dumps(described))
    (quantised / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    values = json.loads((plain / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(values | {"quantization_config": config}))
    return AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()


def gpt_oss(model: Any, folder: Path) -> Any:
    """As openai/gpt-oss-20b and -120b are published."""

    def quantise(name: str, tensor: Tensor) -> tuple[Stored, Tensor] | None:
        if not re.search(r"experts\.(gate_up|down)_proj$", name):
            return None
        pairs, scales = to_fp4(tensor.transpose(1, 2))
        worth = from_fp4(pairs, scales).transpose(1, 2)
        return {f"{name}_blocks": pairs, f"{name}_scales": scales}, worth

    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    config = {"quant_method": "mxfp4", "modules_to_not_convert": [*skipped, "lm_head"]}
    return save_quantised(model, folder, quantise, config)


def fp8(
    model: Any,
    folder: Path,
    *,
    block: tuple[int, int] | None = (128, 128),
    kind: torch.dtype = torch.float32,
    suffix: str = ".weight_scale_inv",
    extra: str | None = None,
    fp4_experts: bool = False,
    **config: Any,
) -> Any:
    """All linear layers but gates and the head; ``extra`` names a scale of activations."""

    def quantise(name: str, tensor: Tensor) -> tuple[Stored, Tensor] | None:
        if not re.search(r"(_proj(_with_mqa)?|\.w[123]|\.w(q|o)_[ab]|\.wkv)\.weight$", name):
            return None
        stem = name.removesuffix(".weight")
        if fp4_experts and ".experts." in name:
            pairs, scales = to_fp4(tensor)
            worth = from_fp4(pairs, scales)
            codes, scales = pairs.flatten(-2).view(torch.int8), scales.view(torch.float8_e8m0fnu)
        else:
            codes, scales = to_fp8(tensor, block, kind)
            worth = from_fp8(codes, scales, block)
        stored = {name: codes, f"{stem}{suffix}": scales}
        if extra:
            stored[f"{stem}{extra}"] = torch.tensor(0.5)
        return stored, worth

    described = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    if block:
        config["weight_block_size"] = list(block)
    return save_quantised(model, folder, quantise, described | config)


# No dimension is a multiple of 128.
_UNEVEN: Any = {"hidden_size": 144, "moe_intermediate_size": 136, "intermediate_size": 200}
# Whole groups of 32.
_GROUPS: Any = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 96}

# Small models as they are published; each is written to a folder, and what plain transformers
# holds of it comes back.
FORMS: dict[str, Callable[[Path], Any]] = {
    "gpt-oss": lambda folder: gpt_oss(tiny_model("gpt_oss", **_GROUPS), folder),
    "deepseek-v3": lambda folder: fp8(tiny_model("deepseek_v3", **_UNEVEN), folder),
    "qwen3": lambda folder: fp8(
        tiny_model("qwen3_moe", **_UNEVEN),
        folder,
        kind=torch.bfloat16,
        modules_to_not_convert=["lm_head"],
    ),
    "minimax-m2": lambda folder: fp8(
        tiny_model("minimax_m2", **_UNEVEN), folder, fmt="float8_e4m3fn"
    ),
    "glm": lambda folder: fp8(tiny_model("glm4_moe", **_UNEVEN), folder),
    "small-deepseek-v3": lambda folder: fp8(tiny_model("deepseek_v3"), folder),
    "uneven-blocks": lambda folder: fp8(tiny_model("qwen3_moe"), folder, block=(10, 7)),
    "mxfp8": lambda folder: fp8(
        tiny_model("qwen3_moe"), folder, block=(1, 32), kind=torch.uint8, scale_fmt="ue8m0"
    ),
    "deepseek-v4": lambda folder: fp8(
        tiny_model("deepseek_v4", **_GROUPS),
        folder,
        kind=torch.float8_e8m0fnu,
        suffix=".scale",
        fp4_experts=True,
    ),
    "one-scale": lambda folder: fp8(
        tiny_model("mixtral"), folder, block=None, suffix=".weight_scale", extra=".input_scale"
    ),
    "one-scale-inv": lambda folder: fp8(
        tiny_model("qwen3_moe"), folder, block=None, extra=".activation_scale"
    ),
}


def replaced(value: Any) -> Damage:
    """Set what config.json says of the quantisation."""
    return config(quantization_config=value)
