"""The gradients of a layer call by autograd, written without the project's kernels.

Shape suffixes: T = tokens, K = assignments of a token, H = hidden size, I = intermediate size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.kernels.backward.accumulators import GradientAccumulators
from moesaic.kernels.backward.ffn import BackwardForm, BackwardKernel
from moesaic.kernels.ffn import SHARED_NAMES, ExpertWeights, wide_dtype
from tests.helpers.models.forms import Kind

SHARED = -1


@dataclass(frozen=True, slots=True)
class Gradients:
    """Those of a call; ``experts`` has those of the experts that were used, by tensor.

    Those of tensors that all experts share are there once, under `SHARED`.
    """

    x: Tensor  # (T, H), or (T, K, H) for a row of each assignment
    weights_TK: Tensor
    experts: dict[int, dict[str, Tensor]]

    def named(self) -> dict[str, Tensor]:
        tensors = {f"{e}.{n}": t for e, each in self.experts.items() for n, t in each.items()}
        return {"x": self.x, "weights": self.weights_TK, **tensors}


def autograd_oracle(
    kind: Kind,
    experts: Mapping[int, ExpertWeights],
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    grad_y_TH: Tensor,
) -> Gradients:
    """Autograd in float64 through the whole layer, written out assignment by assignment."""
    used = {e for e in ids_TK.flatten().tolist() if e >= 0}
    leaves = {e: {n: _leaf(t) for n, t in experts[e].tensors().items()} for e in sorted(used)}
    x_TH, weights_TK = _leaf(x_TH), _leaf(weights_TK)
    y_TH = torch.zeros_like(x_TH)
    for t, row in enumerate(ids_TK.tolist()):
        for k, e in enumerate(row):
            if e < 0:
                continue
            own = leaves[e]
            turned = {n: m.T if kind.transposed else m for n, m in own.items() if m.dim() == 2}
            up = turned["up"] @ x_TH[t] + own.get("up_bias", 0.0)
            activated_I = kind.activate(up[None])[0]
            y_H = turned["down"] @ activated_I + own.get("down_bias", 0.0)
            if kind.form.post_norm is not None:
                y_H = kind.form.post_norm(y_H[None], own)[0]
            y_TH = y_TH.index_add(0, torch.tensor([t]), (weights_TK[t, k] * y_H)[None])
    inputs = [x_TH, weights_TK, *(t for own in leaves.values() for t in own.values())]
    if not used:
        return Gradients(torch.zeros_like(x_TH), torch.zeros_like(weights_TK), {})
    x, weights, *rest = torch.autograd.grad(y_TH, inputs, grad_y_TH.double().cpu())
    found, of_experts = iter(rest), dict[int, dict[str, Tensor]]()
    for e, own in leaves.items():
        for name in own:
            sums = of_experts.setdefault(SHARED if name in SHARED_NAMES else e, {})
            sums[name] = next(found) + sums.get(name, 0.0)
    return Gradients(x, weights, of_experts)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().to(torch.float64, copy=True).requires_grad_()


def away_from_limits(
    kind: Kind, experts: Mapping[int, ExpertWeights], x_TH: Tensor, ids_TK: Tensor
) -> Tensor:
    """Leave out the assignments that a clamp might treat otherwise in another precision.

    The derivative jumps at a limit, so rounding there is no small error.
    """
    if kind.limit is None:
        return ids_TK
    kept_TK = ids_TK.clone()
    margin = 4 * torch.finfo(x_TH.dtype).eps
    for t, row in enumerate(ids_TK.tolist()):
        for k, e in enumerate(row):
            if e >= 0:
                own = {n: m.double().cpu() for n, m in experts[e].tensors().items()}
                up = (own["up"].T if kind.transposed else own["up"]) @ x_TH[t].double().cpu()
                up = up + own.get("up_bias", 0.0)
                if bool(((up.abs() - kind.limit).abs() < margin).any()):
                    kept_TK[t, k] = -1
    return kept_TK


def run_backward(
    kernel: BackwardKernel,
    form: BackwardForm,
    experts: Mapping[int, ExpertWeights],
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    grad_y_TH: Tensor,
    *,
    each: bool = False,
    exact: bool = False,
) -> Gradients:
    """Both phases of one call, into memory that held garbage before."""
    wide = wide_dtype(x_TH.dtype)
    shape = (*ids_TK.shape, x_TH.shape[1]) if each else x_TH.shape
    grad_x = torch.full(shape, torch.nan, dtype=wide)
    grad_weights_TK = torch.full(ids_TK.shape, torch.nan, dtype=wide)
    pending = kernel(form, experts, x_TH, ids_TK, weights_TK, grad_y_TH, grad_x, grad_weights_TK)
    accumulators = GradientAccumulators(exact=exact)
    pending.accumulate(accumulators, shared=SHARED)
    taken = {e: accumulators.take(e) for e in (*experts, SHARED) if e in accumulators}
    assert len(accumulators) == 0, "an expert that the call does not have got gradients"
    return Gradients(grad_x, grad_weights_TK, taken)


def assert_gradients_near(
    found: Gradients, expected: Gradients, tolerance: float, *, least: float = 0.0
) -> None:
    """The largest difference is a part of the largest gradient of the same tensor.

    That counts as ``least`` if it is smaller: what cancels out leaves rounding errors of its terms.
    """
    wanted, got = expected.named(), found.named()
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].shape == tensor.shape, name
        if tensor.numel():
            difference = float((got[name].double().cpu() - tensor.double()).abs().max())
            bound = tolerance * max(least, float(tensor.abs().max()))
            assert difference <= bound, f"{name}: {difference} > {bound}"
