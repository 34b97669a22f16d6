"""A forward pass that keeps, and its backward half, against the kernels that compute it again.

Shape suffixes: T = tokens, K = assignments of a token, H = hidden size.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moesaic.kernels.backward.accumulators import GradientAccumulators
from moesaic.kernels.backward.ffn import BackwardForm, PendingGradients, loop_backward
from moesaic.kernels.backward.kept import keeping_forward, kept_backward
from moesaic.kernels.ffn import can_pack, loop_kernel, pack, wide_dtype
from tests.helpers.models.forms import HIDDEN, KINDS, random_experts

pytestmark = pytest.mark.numeric

EXPERTS, TOP_K = 5, 3
Call = tuple[Tensor, Tensor, Tensor, Tensor]


def call(tokens: int, dtype: torch.dtype, *, unused: float = 0.2) -> Call:
    """x, ids, weights and the gradient of the sums."""
    generator = torch.Generator().manual_seed(tokens)
    x_TH, grad_y_TH = (torch.randn(tokens, HIDDEN, generator=generator) for _ in range(2))
    ids_TK = torch.randint(0, EXPERTS, (tokens, TOP_K), generator=generator)
    ids_TK.masked_fill_(torch.rand(tokens, TOP_K, generator=generator) < unused, -1)
    weights_TK = torch.rand(tokens, TOP_K, generator=generator)
    wide = wide_dtype(dtype)
    return x_TH.to(dtype), ids_TK, weights_TK.to(wide), grad_y_TH.to(wide)


def outputs(x_TH: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the sums and for both gradients, which held garbage before."""
    shapes = x_TH.shape, x_TH.shape, ids_TK.shape
    out_TH, grad_x_TH, grad_weights_TK = (
        torch.full(shape, torch.nan, dtype=wide_dtype(x_TH.dtype)) for shape in shapes
    )
    return out_TH, grad_x_TH, grad_weights_TK


def added_up(pending: PendingGradients) -> dict[str, Tensor]:
    sums = GradientAccumulators()
    pending.accumulate(sums)
    return {f"{e}.{name}": t for e in list(sums) for name, t in sums.take(e).items()}


@pytest.mark.parametrize("recognised", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 60])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_both_halves_have_the_bits_of_the_kernels_that_keep_nothing(
    kind: str, dtype: torch.dtype, tokens: int, recognised: bool
) -> None:
    form: BackwardForm = KINDS[kind].backward_form
    if not recognised:
        form = replace(form, activation=None)
    experts = random_experts(KINDS[kind], range(EXPERTS), dtype=dtype)
    x_TH, ids_TK, weights_TK, grad_y_TH = call(tokens, dtype)
    given = x_TH, ids_TK, weights_TK
    expected = outputs(x_TH, ids_TK)
    loop_kernel(form.forward, experts, *given, expected[0])
    wanted = added_up(loop_backward(form, experts, *given, grad_y_TH, *expected[1:]))

    found = outputs(x_TH, ids_TK)
    kept = keeping_forward(form.forward, experts, *given, found[0])
    pending = kept_backward(form, experts, kept, x_TH, weights_TK, grad_y_TH, *found[1:])
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)
    sums = added_up(pending)
    assert sums.keys() == wanted.keys()
    assert all(torch.equal(sums[name], wanted[name]) for name in wanted)


def test_the_memory_that_is_kept_is_what_is_stated() -> None:
    """And the backward half takes it over: it keeps other tensors of 2 H and I for each row."""
    kind = KINDS["gated"]
    experts = random_experts(kind, range(EXPERTS), dtype=torch.float32, intermediate=7)
    x_TH, ids_TK, weights_TK, grad_y_TH = call(10, torch.float32, unused=0.0)
    out_TH, grad_x_TH, grad_weights_TK = outputs(x_TH, ids_TK)
    kept = keeping_forward(kind.form, experts, x_TH, ids_TK, weights_TK, out_TH)
    rows = 10 * TOP_K
    assert kept.nbytes == rows * (2 * 7 * 4 + 8)
    first = {one.up_RU.data_ptr() for one in kept._rows.values()}  # pyright: ignore[reportOptionalMemberAccess]
    half = kept, x_TH, weights_TK, grad_y_TH, grad_x_TH, grad_weights_TK
    pending = kept_backward(kind.backward_form, experts, *half)
    assert kept.nbytes == 0
    assert pending.nbytes == rows * (2 * HIDDEN + 3 * 7) * 4
    taken = {
        one.grad_up_RU.data_ptr()  # pyright: ignore[reportAttributeAccessIssue]
        for one in pending._gradients.values()  # pyright: ignore[reportOptionalMemberAccess]
    }
    assert taken == first


def test_the_backward_half_is_computed_once() -> None:
    kind = KINDS["gated"]
    experts = random_experts(kind, range(EXPERTS), dtype=torch.float64)
    x_TH, ids_TK, weights_TK, grad_y_TH = call(4, torch.float64)
    out_TH, grad_x_TH, grad_weights_TK = outputs(x_TH, ids_TK)
    kept = keeping_forward(kind.form, experts, x_TH, ids_TK, weights_TK, out_TH)
    half = kept, x_TH, weights_TK, grad_y_TH, grad_x_TH, grad_weights_TK
    kept_backward(kind.backward_form, experts, *half)
    with pytest.raises(RuntimeError, match="computed already"):
        kept_backward(kind.backward_form, experts, *half)


def test_packed_experts_are_refused() -> None:
    if not can_pack(torch.device("cpu"), torch.float32):
        pytest.skip("this machine packs nothing")
    kind = KINDS["gated"]
    experts = random_experts(kind, range(EXPERTS))
    x_TH, ids_TK, weights_TK, _ = call(4, torch.float32, unused=0.0)
    used = int(ids_TK.min())
    experts[used] = pack(kind.form, experts[used])
    with pytest.raises(ValueError, match=f"expert {used}: its matrices are packed"):
        keeping_forward(kind.form, experts, x_TH, ids_TK, weights_TK, torch.zeros(4, HIDDEN))
