"""Forms of experts for tests: one of each kind that transformers' experts interface can describe.

Shape suffixes: R = rows, H = hidden size, I = intermediate size, E = experts.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import silu

from moesaic.kernels.backward.ffn import BackwardForm
from moesaic.kernels.ffn import ExpertForm, ExpertWeights

HIDDEN, INTERMEDIATE = 16, 24


def _silu_gate(up_R: Tensor) -> Tensor:
    gate, up = up_R.chunk(2, dim=-1)
    return silu(gate) * up


def _clamped_interleaved(up_R: Tensor) -> Tensor:
    """gpt-oss: gate and up alternate, both clamped."""
    gate, up = up_R[..., ::2].clamp(max=1.0), up_R[..., 1::2].clamp(-1.0, 1.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def _relu2(up_R: Tensor) -> Tensor:
    return torch.relu(up_R).square()


def _norm(y_RH: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    y = y_RH if y_RH.dtype == torch.float64 else y_RH.float()
    scaled = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
    return (scaled * shared["norm"].to(y.dtype)).to(y_RH.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    activate: Callable[[Tensor], Tensor]
    gated: bool = True
    transposed: bool = False
    bias: bool = False
    post_norm: bool = False
    limit: float | None = None  # at which ``activate`` clamps

    @property
    def form(self) -> ExpertForm:
        return ExpertForm(self.transposed, self.activate, _norm if self.post_norm else None)

    @property
    def backward_form(self) -> BackwardForm:
        return BackwardForm.of(self.form, gated=self.gated)


KINDS: dict[str, Kind] = {
    "gated": Kind(activate=_silu_gate),
    "not-gated": Kind(activate=_relu2, gated=False),
    "gated-bias": Kind(activate=_silu_gate, bias=True),
    "not-gated-bias": Kind(activate=_relu2, gated=False, bias=True),
    "transposed": Kind(activate=_silu_gate, transposed=True),
    "transposed-bias": Kind(activate=_silu_gate, transposed=True, bias=True),
    "interleaved-clamped": Kind(
        activate=_clamped_interleaved, transposed=True, bias=True, limit=1.0
    ),
    "post-norm": Kind(activate=_silu_gate, post_norm=True),
}


def random_experts(
    kind: Kind,
    numbers: Iterable[int],
    *,
    dtype: torch.dtype = torch.float32,
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
    seed: int = 0,
    device: str = "cpu",
) -> dict[int, ExpertWeights]:
    """Experts whose outputs are of order 1."""
    generator = torch.Generator().manual_seed(seed)
    wide = 2 * intermediate if kind.gated else intermediate

    def tensor(*shape: int) -> Tensor:
        inputs = shape[-1] if len(shape) == 2 and not kind.transposed else shape[0]
        drawn = torch.randn(shape, generator=generator) / inputs**0.5
        return drawn.to(device=device, dtype=dtype)

    def oriented(out: int, inputs: int) -> Tensor:
        return tensor(inputs, out) if kind.transposed else tensor(out, inputs)

    return {
        number: ExpertWeights(
            up=oriented(wide, hidden),
            down=oriented(hidden, intermediate),
            up_bias=tensor(wide) if kind.bias else None,
            down_bias=tensor(hidden) if kind.bias else None,
            norm=torch.linspace(0.5, 1.5, hidden).to(device, dtype) if kind.post_norm else None,
        )
        for number in numbers
    }


# ---- transformers' own experts ------------------------------------------------------------------

_DECORATED = re.compile(r"^@use_experts_implementation.*\nclass (\w+)", re.MULTILINE)


def decorated_classes() -> dict[str, str]:
    """{class: module} of every class under transformers' `use_experts_implementation`."""
    models = Path(transformers.__file__).parent / "models"
    return {
        name: f"transformers.models.{file.parent.name}.{file.stem}"
        for file in sorted(models.glob("*/modeling_*.py"))
        for name in _DECORATED.findall(file.read_text())
    }


class _AnyConfig:
    """Answers what an experts class may ask of its configuration, whatever it is called there."""

    hidden_act = "silu"
    mlp_hidden_act = "relu2"
    hidden_activation = "gelu_pytorch_tanh"
    mlp_gate_softcap = 2.0
    mlp_up_softcap = 2.0
    swiglu_alpha = 1.702
    _experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        for part, value in (
            ("expert", 8),
            ("latent", HIDDEN),
            ("intermediate", INTERMEDIATE),
            ("hidden", HIDDEN),
            ("limit", 1.0),
            ("eps", 1e-6),
        ):
            if part in name:
                return value
        raise AttributeError(name)


def transformers_experts(name: str, module: str, *, seed: int = 0) -> nn.Module:
    """An experts module of transformers with random weights, run by its own eager forward."""
    experts = getattr(importlib.import_module(module), name)(_AnyConfig())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in experts.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn / HIDDEN**0.5 if parameter.dim() > 1 else 1.0 + 0.2 * drawn)
    return experts.requires_grad_(False).eval()
