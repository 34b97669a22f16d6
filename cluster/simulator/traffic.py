"""What simulated trunks ask for: small calls, their experts as skewed as a gate's.

Shape suffixes: T = tokens, K = choices of a token, E = experts of a layer.
"""

from __future__ import annotations

import numpy as np

from ..placement import LayerKey, Placement
from .settings import Settings

_TOP_K = 2


class Traffic:
    """Random calls; `shift` makes other experts hot."""

    def __init__(self, settings: Settings, rng: np.random.Generator) -> None:
        self._settings = settings
        self._rng = rng
        self._weight_E: dict[LayerKey, np.ndarray] = {}
        self.shift()

    def shift(self) -> None:
        for shape in self._settings.models:
            for layer, experts in shape.experts.items():
                log_E = self._rng.normal(size=experts)
                weight_E = np.exp(log_E)
                self._weight_E[LayerKey(shape.model, layer)] = weight_E / weight_E.sum()

    def next(self, placement: Placement | None) -> tuple[LayerKey, np.ndarray] | None:
        """A layer that is placed, and the choices (T, K) of a call; None while nothing is."""
        keys = sorted(placement.layers) if placement is not None else []
        if not keys:
            return None
        key = keys[int(self._rng.integers(len(keys)))]
        weight_E = self._weight_E[key]
        tokens = int(self._rng.integers(1, 7))
        # The largest of Gumbel noise + log weight: K experts without repetition.
        noise_TE = self._rng.gumbel(size=(tokens, weight_E.size)) + np.log(weight_E)
        ids_TK = np.argsort(-noise_TE, axis=1)[:, :_TOP_K].astype(np.int32)
        if self._rng.random() < 0.1:
            ids_TK[0, 0] = -1  # a choice that nobody uses
        return key, ids_TK

    def pause_s(self) -> float:
        return float(self._rng.exponential(self._settings.think_s))
