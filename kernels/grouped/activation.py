"""What experts do between their two products, as numbers that a kernel can be given.

`Activation.of` recognises a layer's own function by what it computes. A function that it does not
recognise is computed by PyTorch, between the two kernels, and its derivative by autograd
(`value_and_gradient`).

Shape suffixes: R = rows, I = intermediate size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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

    def backward(
        self, up_R: Tensor, grad_RI: Tensor, *, overwrite: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the activated rows, (R, I), and the gradient of ``up_R``, of its shape.

        ``grad_RI`` is that of the activated rows. At a limit a gradient passes, as in PyTorch, and
        NaN stays NaN. With ``overwrite`` the gradient lies in the memory of ``up_R``.
        """
        grad_up_R = up_R if overwrite else torch.empty_like(up_R)
        if not self.gated:
            function_RI = self._function(up_R)
            self._function_backward(up_R, grad_RI, grad_up_R)
            return function_RI, grad_up_R
        pieces = [
            (one[..., ::2], one[..., 1::2]) if self.interleaved else one.chunk(2, dim=-1)
            for one in (up_R, grad_up_R)
        ]
        (gate_RI, value_RI), (grad_gate_RI, grad_value_RI) = pieces
        kept_gate_RI, kept_value_RI = gate_RI, value_RI
        beyond: tuple[Tensor, Tensor] | None = None
        if self.limit < math.inf:
            beyond = gate_RI > self.limit, value_RI.abs() > self.limit
            kept_gate_RI = gate_RI.clamp(max=self.limit)
            kept_value_RI = value_RI.clamp(-self.limit, self.limit)
        factor_RI = kept_value_RI + self.up_offset if self.up_offset else kept_value_RI
        function_RI = self._function(kept_gate_RI)
        activated_RI = function_RI * factor_RI
        # What is read of ``up_R`` is read before it is written to.
        self._function_backward(kept_gate_RI, grad_RI * factor_RI, grad_gate_RI)
        torch.mul(grad_RI, function_RI, out=grad_value_RI)
        if beyond is not None:
            grad_gate_RI.masked_fill_(beyond[0], 0.0)
            grad_value_RI.masked_fill_(beyond[1], 0.0)
        return activated_RI, grad_up_R

    def _function(self, x: Tensor) -> Tensor:
        if self.function == "silu" and self.alpha != 1.0:
            return x * torch.sigmoid(self.alpha * x)
        return FUNCTIONS[self.function](x)

    def _function_backward(self, x: Tensor, grad: Tensor, out: Tensor) -> None:
        """Write the gradient of ``x`` to ``out``, which may be ``x`` itself."""
        aten = torch.ops.aten
        match self.function:
            case "silu":  # x * sigmoid(alpha * x) is silu(alpha * x) / alpha
                x = x if self.alpha == 1.0 else self.alpha * x
                aten.silu_backward(grad, x, grad_input=out)
            case "gelu":
                aten.gelu_backward(grad, x, grad_input=out)
            case "gelu_tanh":
                aten.gelu_backward(grad, x, approximate="tanh", grad_input=out)
            case "relu":
                aten.threshold_backward(grad, x, 0.0, grad_input=out)
            case "relu2":
                torch.mul(grad * torch.relu(x), 2.0, out=out)
            case _:
                raise ValueError(f"function {self.function!r} has no derivative here")

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


def value_and_gradient(
    function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Return function(x), and the gradient of ``x`` given ``grad``, that of the value, by autograd.

    It works inside of `torch.inference_mode`, too, where autograd by itself records nothing; what
    it returns are ordinary tensors.
    """
    value, (gradient,) = value_and_gradients(function, [x], grad)
    return value, gradient


def value_and_gradients(
    function: Callable[..., Tensor], given: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return function(*given), and the gradient of each tensor, as `value_and_gradient` does."""
    with torch.inference_mode(False), torch.enable_grad():
        # A view of a tensor that was made in inference mode would be one itself.
        leaves = [(x.clone() if x.is_inference() else x.detach()).requires_grad_() for x in given]
        value = function(*leaves)
        return value.detach(), torch.autograd.grad(value, leaves, grad)


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
