"""The backward half of experts' arithmetic on CPUs: the gradients of one call.

A call's work has two phases, so that a host can answer in between. A kernel writes the gradients of
x and of the gate weights, which the caller waits for. What it returns (`PendingGradients`) adds the
gradients of the experts' weights to accumulators later, in any thread; that is about two fifths of
the work. Activations are computed again from x, unless the forward call has kept them (`kept`).

All kernels have the same signature (`BackwardKernel`) and are listed in `BACKWARD_KERNELS`.
`reference` is PyTorch's autograd through `expert_ffn`; tests compare the others with it.

Experts that are trained keep plain matrices: products with oneDNN's or vLLM's layout exist in one
direction only, and autograd through them gives no gradient. Packed ones are refused.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token, N = T * K assignments
flattened, R = rows of one expert, I = intermediate size, U = the up-projection's size (2I if gated,
otherwise I).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..ffn import (
    SHARED_NAMES,
    ExpertForm,
    ExpertWeights,
    expert_ffn,
    expert_up,
    sorted_assignments,
)
from ..grouped.activation import Activation, value_and_gradient, value_and_gradients
from ..products import product
from .accumulators import GradientAccumulators


@dataclass(frozen=True, slots=True)
class BackwardForm:
    """The form of a layer's experts, and its activation if its derivative is known."""

    forward: ExpertForm
    activation: Activation | None

    @classmethod
    def of(cls, form: ExpertForm, *, gated: bool) -> BackwardForm:
        """Recognise the activation, which takes a millisecond: once for each layer."""
        return cls(form, Activation.of(form.activate, gated=gated))


class ExpertGradients(Protocol):
    """The gradients of one expert's weights in one call, or what they are computed from."""

    @property
    def nbytes(self) -> int: ...

    def accumulate(
        self, accumulators: GradientAccumulators, key: Hashable, shared: Hashable
    ) -> None:
        """Add them; those of tensors that all experts share go to the key ``shared``."""
        ...


class PendingGradients:
    """The gradients of weights that a call has yet to add, by expert.

    They need nothing of the call's own tensors, which may be overwritten.
    """

    def __init__(self, gradients: dict[int, ExpertGradients]) -> None:
        self._gradients: dict[int, ExpertGradients] | None = gradients

    @property
    def nbytes(self) -> int:
        """How much memory is kept for them."""
        return sum(one.nbytes for one in (self._gradients or {}).values())

    def accumulate(
        self,
        accumulators: GradientAccumulators,
        key_of: Callable[[int], Hashable] = lambda expert: expert,
        shared: Hashable = None,
    ) -> None:
        """Add each used expert's gradients under ``key_of(expert)``, and free their memory.

        Those of what all experts of the layer share (`SHARED_NAMES`) go to the key ``shared``.
        Raises RuntimeError the second time: what is added twice is trained twice.
        """
        if self._gradients is None:
            raise RuntimeError("the gradients of this call have been added already")
        gradients, self._gradients = self._gradients, None
        for expert in list(gradients):
            gradients.pop(expert).accumulate(accumulators, key_of(expert), shared)


class BackwardKernel(Protocol):
    def __call__(
        self,
        form: BackwardForm,
        experts: Mapping[int, ExpertWeights],
        x_TH: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        grad_y_TH: Tensor,
        grad_x: Tensor,
        grad_weights_TK: Tensor,
    ) -> PendingGradients:
        """Write the gradients of x and of the gate weights; return what is left to add.

        ``x_TH``, ``ids_TK`` and ``weights_TK`` are those of the forward call (`ffn.Kernel`), and
        ``grad_y_TH`` is the gradient of its sums. ``grad_x`` is (T, H), the sum over a token's
        assignments, or (T, K, H), a row for each assignment. All gradients have the wide type; they
        are zero where an assignment is unused. Products are in the experts' type, as in the forward
        call, so ``grad_y_TH`` is rounded to it; float16 needs a scaled loss, as anywhere.

        An expert's rows are computed together and in the order of their tokens. So the bits of its
        gradients, and of a (T, K, H) ``grad_x``, depend on its own rows alone. The gradients of a
        norm's parameters come from autograd, in the experts' type.

        Raises ValueError for a packed expert.
        """
        ...


# ---- the reference ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WholeGradients:
    """The gradient of each tensor, by name; as much memory as the expert."""

    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def accumulate(
        self, accumulators: GradientAccumulators, key: Hashable, shared: Hashable
    ) -> None:
        for name, gradient in self.tensors.items():
            accumulators.add(shared if name in SHARED_NAMES else key, name, gradient)


def reference_backward(
    form: BackwardForm,
    experts: Mapping[int, ExpertWeights],
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    grad_y_TH: Tensor,
    grad_x: Tensor,
    grad_weights_TK: Tensor,
) -> PendingGradients:
    """Run autograd through each expert's forward pass.

    Its gradients of weights are rounded to the experts' type before they are added.
    """
    assignments = sorted_assignments(ids_TK, x_TH.device)
    refuse_packed(experts, assignments.experts)
    grad_x.zero_()
    grad_weights_TK.zero_()
    gradients: dict[int, ExpertGradients] = {}
    for number, assignment_R in assignments.pieces():
        token_R = assignment_R // ids_TK.shape[1]
        weights_R = weights_TK.reshape(-1)[assignment_R]
        with torch.inference_mode(False), torch.enable_grad():
            x_RH, weights_R = (_leaf(one) for one in (x_TH[token_R], weights_R))
            tensors = {name: _leaf(one) for name, one in experts[number].tensors().items()}
            y_RH = expert_ffn(form.forward, ExpertWeights.of(tensors), x_RH)
            y_RH = y_RH.to(weights_R.dtype) * weights_R.unsqueeze(-1)
            of_x_RH, of_weights_R, *found = torch.autograd.grad(
                y_RH, [x_RH, weights_R, *tensors.values()], grad_y_TH[token_R]
            )
        write_rows(grad_x, assignment_R, token_R, of_x_RH)
        grad_weights_TK.view(-1)[assignment_R] = of_weights_R
        gradients[number] = WholeGradients(dict(zip(tensors, found, strict=True)))
    return PendingGradients(gradients)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


# ---- expert by expert ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """What an expert's gradients are products of: its rows, in the order of their tokens.

    They take R * (2H + U + I) numbers in the experts' type.
    """

    x_RH: Tensor
    grad_up_RU: Tensor  # of the up-projection's result
    activated_RI: Tensor
    grad_down_RH: Tensor  # of the down-projection's result
    transposed: bool
    names: frozenset[str]  # of the expert's tensors; not every expert has biases
    of_shared: Mapping[str, Tensor]  # the gradients of a norm's parameters, whole

    @property
    def nbytes(self) -> int:
        kept = (self.x_RH, self.grad_up_RU, self.activated_RI, self.grad_down_RH)
        return sum(tensor.nbytes for tensor in (*kept, *self.of_shared.values()))

    def accumulate(
        self, accumulators: GradientAccumulators, key: Hashable, shared: Hashable
    ) -> None:
        for name, gradient in self.of_shared.items():
            accumulators.add(shared, name, gradient)
        for name, grad, given in (
            ("up", self.grad_up_RU, self.x_RH),
            ("down", self.grad_down_RH, self.activated_RI),
        ):
            left, right = (given, grad) if self.transposed else (grad, given)
            accumulators.add_product(key, name, left, right)
            if f"{name}_bias" in self.names:
                accumulators.add_rows(key, f"{name}_bias", grad)


def loop_backward(
    form: BackwardForm,
    experts: Mapping[int, ExpertWeights],
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    grad_y_TH: Tensor,
    grad_x: Tensor,
    grad_weights_TK: Tensor,
) -> PendingGradients:
    """Compute one expert after another."""
    assignments = sorted_assignments(ids_TK, x_TH.device)
    refuse_packed(experts, assignments.experts)
    grad_x.zero_()
    grad_weights_TK.zero_()
    rows: dict[int, ExpertGradients] = {}
    for number, assignment_R in assignments.pieces():
        token_R = assignment_R // ids_TK.shape[1]
        given = (x_TH, token_R), (weights_TK.reshape(-1), assignment_R), (grad_y_TH, token_R)
        # What is kept must be ordinary tensors: other threads are not in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            x_RH, weights_R, grad_y_RH = (one.index_select(0, at_R) for one, at_R in given)
            up_RU = expert_up(form.forward, experts[number], x_RH)
            of_weights_R, of_x_RH, rows[number] = expert_backward(
                form, experts[number], x_RH, up_RU, weights_R, grad_y_RH
            )
        write_rows(grad_x, assignment_R, token_R, of_x_RH)
        grad_weights_TK.view(-1)[assignment_R] = of_weights_R
    return PendingGradients(rows)


def expert_backward(
    form: BackwardForm,
    expert: ExpertWeights,
    x_RH: Tensor,
    up_RU: Tensor,
    weights_R: Tensor,
    grad_y_RH: Tensor,
) -> tuple[Tensor, Tensor, ExpertRows]:
    """Return the gradients of the rows' weights and of x, and the rows for those of the expert.

    ``up_RU`` is what `ffn.expert_up` computes of ``x_RH``; its memory is used for other things.
    """
    dtype, wide = x_RH.dtype, weights_R.dtype
    # Both as in layers whose weights are not transposed; a product reads either layout.
    up_UH, down_HI = (m.t() if form.forward.transposed else m for m in (expert.up, expert.down))
    weights_R1 = weights_R.unsqueeze(-1)
    post_norm, of_shared = form.forward.post_norm, dict[str, Tensor]()
    if post_norm is None:
        # The weight's gradient is <grad_y, down @ activated + bias>, which is <grad_activated,
        # activated> + <grad_y, bias>: that needs no product with the down-projection.
        activated_RI, grad_up_RU, of_weights_R = _through_activation(
            form, up_RU, product(grad_y_RH.to(dtype), down_HI).to(wide)
        )
        if expert.down_bias is not None:
            of_weights_R += grad_y_RH @ expert.down_bias.to(wide)
        grad_up_RU = grad_up_RU.mul_(weights_R1).to(dtype)
        grad_down_RH = (grad_y_RH * weights_R1).to(dtype)
    else:
        y_RH = product(form.forward.activate(up_RU), down_HI.t(), expert.down_bias)
        shared = expert.shared()
        y_RH, (grad_down_RH, *found) = value_and_gradients(
            lambda y_RH, *tensors: post_norm(y_RH, dict(zip(shared, tensors, strict=True))),
            [y_RH, *shared.values()],
            (grad_y_RH * weights_R1).to(dtype),
        )
        of_shared = dict(zip(shared, found, strict=True))
        of_weights_R = (grad_y_RH * y_RH).sum(dim=1)
        activated_RI, grad_up_RU, _ = _through_activation(
            form, up_RU, product(grad_down_RH, down_HI).to(wide)
        )
        grad_up_RU = grad_up_RU.to(dtype)
    kept = ExpertRows(
        x_RH,
        grad_up_RU,
        activated_RI.to(dtype),
        grad_down_RH,
        form.forward.transposed,
        frozenset(expert.tensors()),
        of_shared,
    )
    return of_weights_R, product(grad_up_RU, up_UH), kept


def _through_activation(
    form: BackwardForm, up_RU: Tensor, grad_RI: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the activated rows, the gradient of ``up_RU``, and each row's <grad, activated>.

    Everything is computed and returned in the wide type, that of ``grad_RI``. The memory of what is
    given may be used for what is returned.
    """
    up_RU = up_RU.to(grad_RI.dtype)
    if form.activation is None:
        activated_RI, grad_up_RU = value_and_gradient(form.forward.activate, up_RU, grad_RI)
    else:
        activated_RI, grad_up_RU = form.activation.backward(up_RU, grad_RI, overwrite=True)
    return activated_RI, grad_up_RU, grad_RI.mul_(activated_RI).sum(dim=1)


# ---- both ---------------------------------------------------------------------------------------


def write_rows(grad_x: Tensor, assignment_R: Tensor, token_R: Tensor, rows_RH: Tensor) -> None:
    """Add rows to those of their tokens, or write them to those of their assignments."""
    rows_RH = rows_RH.to(grad_x.dtype)
    if grad_x.dim() == 2:
        grad_x.index_add_(0, token_R, rows_RH)
    else:
        grad_x.view(-1, grad_x.shape[2])[assignment_R] = rows_RH


def refuse_packed(experts: Mapping[int, ExpertWeights], used: list[int]) -> None:
    for number in used:
        if experts[number].is_packed:
            raise ValueError(
                f"expert {number}: its matrices are packed, and only plain ones have a backward "
                "pass; `unpack` the expert first"
            )


BACKWARD_KERNELS: dict[str, BackwardKernel] = {
    "loop": loop_backward,
    "reference": reference_backward,
}
