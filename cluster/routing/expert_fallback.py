"""Requests' options for experts, applied to the rows of a batch.

The options (`expert_options.py`) say how many experts a token gets, and what happens to a row if
one of its experts is missing.

Shape suffixes: T = tokens, K = experts of a token, N = T * K assignments flattened.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .expert_options import WAIT, RowGroups

_ALL = 1 << 30  # more experts than any token has


class DroppedExperts(NamedTuple):
    """Experts that were left out of a request's rows."""

    largest: float  # largest fraction of a token's gate weights left out in one layer
    times: int  # number of (token, layer) pairs that lacked an expert

    def and_then(self, part: float) -> DroppedExperts:
        return DroppedExperts(max(self.largest, part), self.times + 1)


class FallbackDecision(NamedTuple):
    """What happens to the rows with an assignment that was not computed."""

    dropped: dict[int, float]  # row -> fraction of its gate weights that is left out
    lost: list[int]  # rows that cannot go on without it


class BatchExpertOptions:
    """The options of each row of a batch; rows after the last group have the defaults."""

    def __init__(self, groups: RowGroups | None, tokens: int, deadline_s: float) -> None:
        """Apply the groups' options to ``tokens`` rows.

        If the groups have more rows than the batch, rows cannot be told apart: all wait until the
        deadline, and have all their experts.
        """
        known = groups or ()
        apart = sum(rows for rows, _ in known) <= tokens
        self.patience_T = np.full(tokens, WAIT.patience_s(deadline_s) if apart else deadline_s)
        # Largest fraction of the gate weights that each row may lose; -1: none, not even 0.
        self._most_T = np.full(tokens, -1.0)
        self.experts_T: np.ndarray | None = None  # experts per token; None: no row sets it
        start = 0
        for rows, expert_options in known if apart else ():
            mine = slice(start, start + rows)
            missing = expert_options.missing
            self.patience_T[mine] = missing.patience_s(deadline_s)
            self._most_T[mine] = missing.most_dropped if missing.mode == "drop" else -1.0
            if expert_options.experts_per_token is not None:
                if self.experts_T is None:
                    self.experts_T = np.full(tokens, _ALL)
                self.experts_T[mine] = expert_options.experts_per_token
            start += rows

    def decide(self, lost_n: np.ndarray, weights_N: np.ndarray, top_k: int) -> FallbackDecision:
        """Decide which rows go on without the lost assignments, whose numbers ``lost_n`` has."""
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
        return FallbackDecision(dropped, lost)


def keep_top_experts(
    ids_TK: np.ndarray, weights_TK: np.ndarray, most_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Keep each token's ``most_T`` experts with the largest weights; return new (ids, weights).

    The ids of the others become -1; ids that are -1 already count as weight 0. The kept weights are
    scaled so that their sum stays the same. For gates whose weights have the same sum for every
    token, this is what the gate would have returned with a smaller top-k.
    """
    size_TK = np.where(ids_TK < 0, 0, np.abs(weights_TK))
    order_TK = np.argsort(-size_TK, axis=1, kind="stable")
    rank_TK = np.empty_like(order_TK)  # inverse of the sort: each expert's place in the order
    np.put_along_axis(rank_TK, order_TK, np.arange(ids_TK.shape[1])[None], axis=1)
    kept_TK = rank_TK < most_T[:, None]
    whole_T, part_T = size_TK.sum(axis=1), np.where(kept_TK, size_TK, 0).sum(axis=1)
    scale_T = np.divide(whole_T, part_T, out=np.ones_like(whole_T), where=part_T > 0)
    return np.where(kept_TK, ids_TK, -1), weights_TK * scale_T[:, None]
