"""Assignments as rows of sends, against a plain statement of it.

Shape suffixes: n = assignments.
"""

from __future__ import annotations

from itertools import groupby

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moesaic.cluster.routing.row_grouping import rows_of_groups


def plain(
    assignments: list[int], groups: list[int], top_k: int, max_rows: int
) -> list[tuple[int, list[int], list[list[int]]]]:
    """(group, tokens, rows padded to the group's widest) of each send."""
    found = []
    for group in sorted(set(groups) - {-1}):
        mine = [a for a, g in zip(assignments, groups, strict=True) if g == group]
        rows = [list(row) for _, row in groupby(mine, key=lambda a: a // top_k)]
        width = max(map(len, rows))
        for start in range(0, len(rows), max_rows):
            part = rows[start : start + max_rows]
            padded = [row + [-1] * (width - len(row)) for row in part]
            found.append((group, [row[0] // top_k for row in part], padded))
    return found


@given(data=st.data(), top_k=st.integers(1, 4), max_rows=st.integers(1, 6))
def test_each_group_gets_its_rows(data: st.DataObject, top_k: int, max_rows: int) -> None:
    assignments = sorted(data.draw(st.sets(st.integers(0, 59), max_size=40)))
    groups = [data.draw(st.integers(-1, 5)) for _ in assignments]
    ids_N = np.arange(60 * top_k, dtype=np.int32)[::-1].copy()
    assignment_n, group_n = np.array(assignments, np.int64), np.array(groups, np.int64)
    found = list(rows_of_groups(assignment_n, group_n, ids_N, top_k, max_rows))
    wanted = plain(assignments, groups, top_k, max_rows)
    assert [(g, rows.token_t.tolist(), rows.assignment_tk.tolist()) for g, rows in found] == wanted
    for _, rows in found:
        assert rows.assignments.tolist() == [a for a in rows.assignment_tk.ravel() if a >= 0]
        padded_tk = rows.assignment_tk < 0
        assert (rows.ids_tk == np.where(padded_tk, -1, ids_N[rows.assignment_tk])).all()
