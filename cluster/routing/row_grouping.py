"""Arithmetic of dispatch: ranks of assignments within an expert, and assignments as rows of sends.

Shape suffixes: n = assignments, numbered t * K + k, t and k = rows and columns of one send, r and c
= rows and columns of all sends, g = groups.
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


def _starts_of_runs(values: np.ndarray) -> np.ndarray:
    """Return True where a value differs from the one before it; ``values`` is not empty."""
    starts = np.empty(values.size, dtype=bool)
    starts[0] = True
    np.not_equal(values[1:], values[:-1], out=starts[1:])
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
    assignment_n: np.ndarray, group_n: np.ndarray, top_k: int, max_rows: int
) -> Iterator[tuple[int, SendRows]]:
    """Yield (group, rows) for assignments, which are ascending; groups below 0 are left out.

    The rows of a group are split after ``max_rows``.
    """
    # The rows of all groups are made at once, one group below the other, since numpy takes as long
    # for a few numbers as for a thousand. A send is a part of this table.
    order = group_n.argsort(kind="stable")
    order = order[group_n[order].searchsorted(0) :]
    if not order.size:
        return
    mine_n, group_n = assignment_n[order], group_n[order]
    token_n = mine_n // top_k
    first_n = _starts_of_runs(token_n) | _starts_of_runs(group_n)
    start_r = first_n.nonzero()[0]
    row_n = first_n.cumsum() - 1
    column_n = np.arange(mine_n.size) - start_r[row_n]
    size_r = np.empty_like(start_r)
    np.subtract(start_r[1:], start_r[:-1], out=size_r[:-1])
    size_r[-1] = mine_n.size - start_r[-1]
    mine_rc = np.full((start_r.size, int(size_r.max())), -1, dtype=np.int64)
    mine_rc[row_n, column_n] = mine_n
    token_r = token_n[start_r]
    first_row_g = _starts_of_runs(group_n[start_r]).nonzero()[0]
    widths = np.maximum.reduceat(size_r, first_row_g).tolist()
    groups = group_n[start_r[first_row_g]].tolist()
    bounds, starts = [*first_row_g.tolist(), start_r.size], [*start_r.tolist(), mine_n.size]
    for place, (group, width) in enumerate(zip(groups, widths, strict=True)):
        for row in range(bounds[place], bounds[place + 1], max_rows):
            end = min(row + max_rows, bounds[place + 1])
            yield (
                group,
                SendRows(
                    mine_n[starts[row] : starts[end]], token_r[row:end], mine_rc[row:end, :width]
                ),
            )
