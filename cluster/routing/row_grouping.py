"""Arithmetic of dispatch: ranks of assignments within an expert, and assignments as rows of sends.

Shape suffixes: N = all assignments of a call, numbered t * K + k, n = some of them, t and k = rows
and columns of one send, r and c = rows and columns of all sends, g = groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class SendRows(NamedTuple):
    """The assignments of one send, and as rows: one for each token, padded with -1 on the right."""

    assignments: np.ndarray  # ascending
    token_t: np.ndarray
    assignment_tk: np.ndarray
    ids_tk: np.ndarray  # their experts


def _starts_of_runs(values: np.ndarray, *, and_end: bool = False) -> np.ndarray:
    """Return True where a value differs from the one before it; ``values`` is not empty.

    With ``and_end`` one more True follows.
    """
    size = values.size
    starts = np.ones(size + and_end, dtype=bool)
    np.not_equal(values[1:], values[:-1], out=starts[1:size])
    return starts


def rank_within_expert(ids_n: np.ndarray) -> np.ndarray:
    """Return for each assignment how many assignments of the same expert come before it."""
    # A stable sort makes one run of each expert. The rank is the position within the run: the
    # position minus that of the run's start, which a running maximum carries forward.
    order = np.argsort(ids_n, kind="stable")
    first = _starts_of_runs(ids_n[order])
    position = np.arange(ids_n.size)
    rank = np.empty(ids_n.size, dtype=np.int64)
    rank[order] = position - np.maximum.accumulate(np.where(first, position, 0))
    return rank


def rows_of_groups(
    assignment_n: np.ndarray, group_n: np.ndarray, ids_N: np.ndarray, top_k: int, max_rows: int
) -> Iterator[tuple[int, SendRows]]:
    """Yield (group, rows) for assignments, which are ascending; groups below 0 are left out.

    ``ids_N`` has the expert of each assignment. The rows of a group are split after ``max_rows``.
    """
    # The rows of all groups are made at once, one group below the other, since numpy takes as long
    # for a few numbers as for a thousand. A send is a part of this table.
    order = group_n.argsort(kind="stable")
    group_n = group_n[order]
    if order.size and group_n[0] < 0:
        none = int(group_n.searchsorted(0))
        order, group_n = order[none:], group_n[none:]
    if not order.size:
        return
    mine_n = assignment_n[order]
    # One number for each pair of a group and a token: a row begins where it changes.
    tokens = ids_N.size // top_k
    pair_n = group_n.astype(np.int64)
    pair_n *= tokens
    pair_n += mine_n // top_k
    bound_r = _starts_of_runs(pair_n, and_end=True).nonzero()[0]
    start_r = bound_r[:-1]
    group_r, token_r = np.divmod(pair_n[start_r], tokens)
    size_r = bound_r[1:] - start_r
    most = min(int(np.maximum.reduce(size_r)), mine_n.size)
    # The place of each assignment in the table is that of its row's start, and its own distance
    # from there.
    place_n = np.arange(mine_n.size)
    place_n += (np.arange(0, start_r.size * most, most) - start_r).repeat(size_r)
    mine_rc = np.empty((start_r.size, most), dtype=np.int64)
    mine_rc.fill(-1)
    mine_rc.reshape(-1)[place_n] = mine_n
    ids_rc = np.empty(mine_rc.shape, dtype=ids_N.dtype)
    ids_rc.fill(-1)
    ids_rc.reshape(-1)[place_n] = ids_N[mine_n]
    bound_g = _starts_of_runs(group_r, and_end=True).nonzero()[0]
    first_row_g = bound_g[:-1]
    widths = np.maximum.reduceat(size_r, first_row_g).tolist()
    groups = group_r[first_row_g].tolist()
    bounds, starts = bound_g.tolist(), bound_r.tolist()
    for place, (group, width) in enumerate(zip(groups, widths, strict=True)):
        for row in range(bounds[place], bounds[place + 1], max_rows):
            end = min(row + max_rows, bounds[place + 1])
            yield (
                group,
                SendRows(
                    mine_n[starts[row] : starts[end]],
                    token_r[row:end],
                    mine_rc[row:end, :width],
                    ids_rc[row:end, :width],
                ),
            )
