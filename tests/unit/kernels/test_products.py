"""Matrix products, on CPUs with and without instructions for 16-bit types."""

from __future__ import annotations

import pytest
import torch

from moesaic.kernels import products

INPUTS, OUTPUTS = 96, 40


@pytest.mark.numeric
@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 33])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_rounded_once(
    monkeypatch: pytest.MonkeyPatch,
    multiplies: bool,
    dtype: torch.dtype,
    rows: int,
    by_columns: bool,
    bias: bool,
) -> None:
    monkeypatch.setattr(products, "_multiplies", lambda dtype: multiplies)
    chance = torch.Generator().manual_seed(rows)
    x_RI = torch.randn(rows, INPUTS, generator=chance).to(dtype)
    matrix_IO = torch.randn(INPUTS, OUTPUTS, generator=chance).to(dtype)
    if by_columns:
        matrix_IO = matrix_IO.t().contiguous().t()
    bias_O = torch.randn(OUTPUTS, generator=chance).to(dtype) if bias else None

    found_RO = products.product(x_RI, matrix_IO, bias_O)

    exact_RO = x_RI.double() @ matrix_IO.double() + (0.0 if bias_O is None else bias_O.double())
    # What float32 sums lose, and half a unit of the last place.
    scale_RO = x_RI.double().abs() @ matrix_IO.double().abs()
    allowed_RO = scale_RO * 1e-6 + exact_RO.abs() * torch.finfo(dtype).eps / 2 * 1.01
    assert found_RO.dtype == dtype
    assert found_RO.shape == (rows, OUTPUTS)
    assert bool(((found_RO.double() - exact_RO).abs() <= allowed_RO).all())


def test_few_rows_are_not_worth_a_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_multiplies", lambda dtype: False)
    by_columns = torch.ones(4, 6, dtype=torch.bfloat16).t()

    def widened(rows: int, matrix: torch.Tensor) -> bool:
        return products._is_widened(torch.ones(rows, matrix.shape[0], dtype=matrix.dtype), matrix)

    assert [widened(rows, by_columns) for rows in (1, 7, 8)] == [False, False, True]
    assert widened(1, by_columns.contiguous()), "then torch multiplies number by number"
    assert not widened(100, by_columns.float())
