"""What a request wants of the experts: how many for a token, and what is to happen when one is not
to be had; and what that means for a batch.

Shape suffixes: T = tokens, K = choices of a token, N = T * K choices flattened.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .expert_options import WAIT, RowGroups

_ALL = 1 << 30  # experts: more than any token has


class Dropped(NamedTuple):
    """Experts that a request went without."""

    largest: float  # part of one token's gate weights in one layer
    times: int  # tokens of one layer each

    def and_then(self, part: float) -> Dropped:
        return Dropped(max(self.largest, part), self.times + 1)


class Judgement(NamedTuple):
    """What becomes of the rows that lack a choice."""

    dropped: dict[int, float]  # row -> part of its gate weights that is left out
    lost: list[int]


class RowWishes:
    """The wishes of a batch's rows; those behind the last group have none."""

    def __init__(self, groups: RowGroups | None, tokens: int, deadline_s: float) -> None:
        """A batch of other than the groups' rows cannot be told apart: all of it waits, and
        together, and has all its experts."""
        known = groups or ()
        apart = sum(rows for rows, _ in known) <= tokens
        self.patience_T = np.full(tokens, WAIT.patience_s(deadline_s) if apart else deadline_s)
        self._most_T = np.full(tokens, -1.0)  # -1: nothing may be dropped
        self.experts_T: np.ndarray | None = None  # None: nobody wants fewer than there are
        start = 0
        for rows, wish in known if apart else ():
            mine = slice(start, start + rows)
            missing = wish.missing
            self.patience_T[mine] = missing.patience_s(deadline_s)
            self._most_T[mine] = missing.most_dropped if missing.mode == "drop" else -1.0
            if wish.experts_per_token is not None:
                if self.experts_T is None:
                    self.experts_T = np.full(tokens, _ALL)
                self.experts_T[mine] = wish.experts_per_token
            start += rows

    def judge(self, lost_n: np.ndarray, weights_N: np.ndarray, top_k: int) -> Judgement:
        """``lost_n``: numbers of choices without an answer."""
        weights_TK = np.abs(weights_N.reshape(-1, top_k))
        missing_TK = np.zeros(weights_TK.shape, dtype=bool)
        missing_TK.reshape(-1)[lost_n] = True
        dropped, lost = {}, []
        for row in np.flatnonzero(missing_TK.any(axis=1)).tolist():
            whole = float(weights_TK[row].sum())
            part = float(weights_TK[row][missing_TK[row]].sum()) / whole if whole > 0 else 1.0
            if part <= self._most_T[row]:
                dropped[row] = part
            else:
                lost.append(row)
        return Judgement(dropped, lost)


def largest_choices(
    ids_TK: np.ndarray, weights_TK: np.ndarray, most_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Each token's ``most_T`` choices of the largest weights; the others become -1, and those that
    are -1 count for nothing.

    What is kept is scaled to the sum of all: where a gate's weights add up to the same for every
    token, that is what it would have given had it chosen so few.
    """
    size_TK = np.where(ids_TK < 0, 0, np.abs(weights_TK))
    order_TK = np.argsort(-size_TK, axis=1, kind="stable")
    rank_TK = np.empty_like(order_TK)
    np.put_along_axis(rank_TK, order_TK, np.arange(ids_TK.shape[1])[None], axis=1)
    kept_TK = rank_TK < most_T[:, None]
    whole_T, part_T = size_TK.sum(axis=1), np.where(kept_TK, size_TK, 0).sum(axis=1)
    scale_T = np.divide(whole_T, part_T, out=np.ones_like(whole_T), where=part_T > 0)
    return np.where(kept_TK, ids_TK, -1), weights_TK * scale_T[:, None]
