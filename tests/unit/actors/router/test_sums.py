"""The answers to one call, added up on the CPU and on a device.

Shape suffixes: T = tokens, K = assignments of a token, H = hidden size, N = T * K, t, k = rows and
columns of one send.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moesaic.actors.router.layer_tensors import CpuSums, DeviceSums
from moesaic.cluster.routing.row_grouping import rows_of_groups

TOKENS, TOP_K, HIDDEN = 9, 3, 4
SHAPE = TOKENS, TOP_K, HIDDEN
UNUSED, LENT, HOSTS = -1, 0, ("a", "b", "c")


def parts_of(y_NH: Tensor, who_N: np.ndarray, *, exact: bool) -> tuple[list[Any], Any]:
    """Return (send, answer) of each host, and what was lent; ``who_N`` says who computes what."""
    ids_N = np.zeros(TOKENS * TOP_K, dtype=np.int32)
    used = np.flatnonzero(who_N > LENT)
    parts = []
    for group, rows in rows_of_groups(used, who_N[used] - 1, ids_N, TOP_K, max_rows=4):
        y_tkH = torch.zeros(*rows.assignment_tk.shape, HIDDEN)
        there = torch.from_numpy(rows.assignment_tk >= 0)
        y_tkH[there] = y_NH[torch.from_numpy(rows.assignments)]
        send = SimpleNamespace(host=HOSTS[group], **rows._asdict())
        parts.append((send, y_tkH if exact else y_tkH.sum(dim=1)))
    mine_TK = torch.from_numpy(who_N == LENT).view(TOKENS, TOP_K)
    if not mine_TK.any():
        return parts, None
    y_TKH = torch.where(mine_TK[..., None], y_NH.view(TOKENS, TOP_K, HIDDEN), 0.0)
    ids_TK = torch.where(mine_TK, 0, -1)
    return parts, SimpleNamespace(ids_TK=ids_TK, out=y_TKH if exact else y_TKH.sum(dim=1))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("exact", [False, True])
@given(
    who=st.lists(st.sampled_from([UNUSED, LENT, 1, 2, 3]), min_size=27, max_size=27),
    seed=st.integers(0, 1000),
)
def test_a_device_adds_up_the_bits_that_a_cpu_does(
    exact: bool, device: str, who: list[int], seed: int
) -> None:
    """With ``exact`` they do not even depend on who has computed what."""
    generator = torch.Generator().manual_seed(seed)
    y_NH, who_N = torch.randn(TOKENS * TOP_K, HIDDEN, generator=generator), np.array(who)
    y_NH[torch.from_numpy(who_N == UNUSED)] = 0.0
    found = []
    for kind, where in ((CpuSums, "cpu"), (DeviceSums, device)):
        parts, lent = parts_of(y_NH, who_N, exact=exact)
        if lent is not None:
            lent.out = lent.out.to(where)
        sums = kind(SHAPE, torch.float32, torch.device(where), exact=exact)
        order = torch.randperm(len(parts), generator=generator).tolist()
        for send, y in [parts[number] for number in order]:
            sums.take(send, y)
            y.fill_(torch.nan)  # its memory is used again
        found.append(sums.sum(lent).cpu())
    assert torch.equal(*found)
    if exact:
        y_TKH = y_NH.view(TOKENS, TOP_K, HIDDEN)
        assert torch.equal(found[0], y_TKH[:, 0] + y_TKH[:, 1] + y_TKH[:, 2])
    else:
        torch.testing.assert_close(found[0], y_NH.view(TOKENS, TOP_K, HIDDEN).sum(dim=1))
