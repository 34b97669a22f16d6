"""Arithmetic of dispatch: ranks of assignments within an expert, and assignments as rows of a send.

Shape suffixes: n = assignments, numbered t * K + k, t and k = rows and columns of one send.
"""

from __future__ import annotations

import numpy as np


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


def rows_of(
    assignments: np.ndarray, top_k: int, max_rows: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return ascending assignments as rows (token_t, assignment_tk), split after ``max_rows`` rows.

    One row has all assignments of one token; assignment_tk is padded with -1 on the right.
    """
    token_n = assignments // top_k
    first = _starts_of_runs(token_n)
    row_n = np.cumsum(first) - 1
    starts = np.flatnonzero(first)
    column_n = np.arange(assignments.size) - starts[row_n]
    assignment_tk = np.full((starts.size, int(column_n.max()) + 1), -1, dtype=np.int64)
    assignment_tk[row_n, column_n] = assignments
    token_t = token_n[starts]
    if token_t.size <= max_rows:
        return [(token_t, assignment_tk)]
    return [
        (token_t[i : i + max_rows], assignment_tk[i : i + max_rows])
        for i in range(0, token_t.size, max_rows)
    ]
