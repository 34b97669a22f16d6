"""What experts do between their two products, as numbers that a kernel can be given.

`Activation.of` recognises a layer's own function by what it computes. A function that it does not
recognise is computed by PyTorch, between the two kernels.

Shape suffixes: R = rows, I = intermediate size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# Without ``alpha``; SiLU is x * sigmoid(alpha * x) with alpha 1.
FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
}
_FAR = 1e6  # an input beyond any limit
_PROBE_WIDTH = 64


@dataclass(frozen=True, slots=True)
class Activation:
    """``f(min(gate, limit)) * (clamp(up, -limit, limit) + up_offset)``, or ``f(x)`` if not gated.

    ``interleaved`` says that the up-projection's rows are gate, up, gate, up ... and not all gates
    first. ``alpha`` is the factor in SiLU's sigmoid (gpt-oss: 1.702).
    """

    function: str
    gated: bool = True
    interleaved: bool = False
    alpha: float = 1.0
    limit: float = math.inf
    up_offset: float = 0.0

    def __call__(self, up_R: Tensor) -> Tensor:
        """Map (R, 2I), or (R, I) if not gated, to (R, I)."""
        if not self.gated:
            return self._function(up_R)
        if self.interleaved:
            gate_RI, value_RI = up_R[..., ::2], up_R[..., 1::2]
        else:
            gate_RI, value_RI = up_R.chunk(2, dim=-1)
        if self.limit < math.inf:
            gate_RI = gate_RI.clamp(max=self.limit)
            value_RI = value_RI.clamp(-self.limit, self.limit)
        return self._function(gate_RI) * (value_RI + self.up_offset)

    def _function(self, x: Tensor) -> Tensor:
        if self.function == "silu":
            return x * torch.sigmoid(self.alpha * x)
        return FUNCTIONS[self.function](x)

    @classmethod
    def of(cls, activate: Callable[[Tensor], Tensor], *, gated: bool) -> Activation | None:
        """Return what ``activate`` computes, or None if it is none of these.

        Candidates are compared on a probe, with large magnitudes too because some functions clamp.
        """
        magnitudes_R1 = torch.tensor([0.1, 0.5, 1.0, 10.0, 100.0, 1000.0]).double().unsqueeze(1)
        generator = torch.Generator().manual_seed(0)
        probe_R = magnitudes_R1 * torch.randn(6, _PROBE_WIDTH, generator=generator).double()
        try:
            found_RI = activate(probe_R)
            candidates = (
                _gated(activate) if gated else [cls(name, gated=False) for name in FUNCTIONS]
            )
        except (RuntimeError, IndexError, ValueError):
            return None  # it needs other shapes or dtypes
        for candidate in candidates:
            expected_RI = candidate(probe_R)
            if found_RI.shape == expected_RI.shape and torch.allclose(
                found_RI.double(), expected_RI, rtol=1e-5, atol=1e-6
            ):
                return candidate
        return None


def _gated(activate: Callable[[Tensor], Tensor]) -> list[Activation]:
    """Return what a gated function may be, its numbers read from single values.

    With a gate g and a value v, small enough for any limit, it computes f(g) * (v + offset). So two
    values give f(g) and the offset, a far value gives the limit, and f(g) gives SiLU's alpha.
    """
    found = []
    for interleaved in (False, True):

        def at(gate: float, value: float, *, interleaved: bool = interleaved) -> float:
            one_R = torch.empty(1, _PROBE_WIDTH, dtype=torch.float64)
            gates, values = (
                (one_R[:, ::2], one_R[:, 1::2]) if interleaved else one_R.chunk(2, dim=-1)
            )
            gates.fill_(gate)
            values.fill_(value)
            return float(activate(one_R)[0, 0])

        gate = 0.5
        f = (at(gate, 0.25) - at(gate, 0.0)) / 0.25
        if not math.isfinite(f) or f == 0.0:
            continue
        offset = _rounded(at(gate, 0.0) / f)
        limit = _rounded(at(gate, _FAR) / f - offset)
        limit = limit if limit < _FAR / 2 else math.inf
        share = f / gate  # sigmoid(alpha * gate), if it is SiLU
        for name in FUNCTIONS:
            alpha = 1.0
            if name == "silu":
                if not 0.0 < share < 1.0:
                    continue
                alpha = _rounded(math.log(share / (1.0 - share)) / gate)
            found.append(Activation(name, True, interleaved, alpha, limit, offset))
    return found


def _rounded(value: float) -> float:
    """Return what somebody wrote, without the noise of computing it back."""
    return float(f"{value:.5g}") + 0.0
