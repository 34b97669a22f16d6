"""The calls of simulated trunks: small ones, with experts as skewed as those of a real gate.

Shape suffixes: T = tokens, K = experts of a token, E = experts of a layer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..expert_keys import LayerKey
from ..placement import Placement
from ..routing.expert_options import SHORT_WAIT_S
from .settings import Settings

_TOP_K = 2


class LayerRequest(NamedTuple):
    """One layer's call: expert ids (T, K), and how many seconds each token waits for an expert."""

    key: LayerKey
    ids_TK: np.ndarray
    patience_T: np.ndarray


class Traffic:
    """Random calls; `shift` makes other experts hot, and changes how often calls are made."""

    def __init__(self, settings: Settings, rng: np.random.Generator) -> None:
        self._settings = settings
        self._rng = rng
        self._weight_E: dict[LayerKey, np.ndarray] = {}
        self._pace = 1.0
        self.shift()

    def shift(self) -> None:
        self._pace = float(self._rng.choice([0.5, 1.0, 2.0, 4.0]))
        for shape in self._settings.models:
            for layer, experts in shape.experts.items():
                log_E = self._rng.normal(size=experts)
                weight_E = np.exp(log_E)
                self._weight_E[LayerKey(shape.model, layer)] = weight_E / weight_E.sum()

    def next(self, placement: Placement | None) -> LayerRequest | None:
        """Return a call of a layer in ``placement``; None if there is no layer."""
        keys = sorted(placement.layers) if placement is not None else []
        if not keys:
            return None
        key = keys[int(self._rng.integers(len(keys)))]
        weight_E = self._weight_E[key]
        tokens = int(self._rng.integers(1, 7))
        # Gumbel-top-k: the K largest of log weight + Gumbel noise are K different experts, drawn in
        # proportion to their weights.
        noise_TE = self._rng.gumbel(size=(tokens, weight_E.size)) + np.log(weight_E)
        ids_TK = np.argsort(-noise_TE, axis=1)[:, :_TOP_K].astype(np.int32)
        if self._rng.random() < 0.1:
            ids_TK[0, 0] = -1  # an assignment that is not used
        patience_T = np.full(tokens, self._settings.router.deadline_s)
        hasty_T = self._rng.random(tokens) < (0.5 if self._rng.random() < 0.2 else 0.0)
        patience_T[hasty_T] = SHORT_WAIT_S
        return LayerRequest(key, ids_TK, patience_T)

    def pause_s(self) -> float:
        return float(self._rng.exponential(self._pace * self._settings.think_s))
