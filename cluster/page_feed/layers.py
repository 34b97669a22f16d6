"""Loads and placements of layers as arrays of small unsigned integers.

Shape suffixes: E = experts of a layer, R = all their replicas.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from ..expert_keys import LayerKey
from ..placement import LayerPlacement

LOAD_UNITS = 10  # tenths of an assignment per second: what reports show
SHARE_UNITS = 10_000
EVEN_UNITS = 10_000
NO_LOAD = 0xFFFF  # instead of a balancedness
# Names of hosts that left may stand in the table until there are so many.
_LEFT = 64


def item_name(key: LayerKey) -> str:
    """Return the name of a layer's item, after its kind: `3:demo`."""
    return f"{key.layer}:{key.model}"


def small(values: np.ndarray) -> np.ndarray:
    """Return whole numbers >= 0 as u1, u2 or u4; what is larger becomes the largest number."""
    most = int(values.max()) if values.size else 0
    if most < 1 << 8:
        return values.astype(np.uint8)
    if most < 1 << 16:
        return values.astype(np.uint16)
    return np.minimum(values, (1 << 32) - 1).astype(np.uint32)


def load_tenths(rate_E: np.ndarray | None, experts: int) -> np.ndarray:
    """Return (E,) tenths of an assignment per second, as reports round them; zeros if unknown."""
    if rate_E is None or rate_E.size != experts:
        return np.zeros(experts, dtype=np.uint8)
    return small(np.rint(rate_E * LOAD_UNITS))


def even_units(layers: Collection[LayerKey], found: Mapping[LayerKey, float]) -> np.ndarray:
    """Return each layer's balancedness in units of 1/10000, or `NO_LOAD`."""
    return np.array(
        [round(found[key] * EVEN_UNITS) if key in found else NO_LOAD for key in layers],
        dtype=np.uint16,
    )


class PlacedLayers:
    """Turns placements into items, and only those layers that are not as before.

    An item has ``counts`` (E,), how many replicas each expert has, and for all replicas in a row
    ``hosts`` (R,), indices into `names`, and ``shares`` (R,), in units of 1/10000.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._index: dict[str, int] = {}
        self._seen: dict[LayerKey, LayerPlacement] = {}
        self._encoded: dict[str, Mapping[str, np.ndarray]] = {}

    def items(
        self, layers: Mapping[LayerKey, LayerPlacement], hosts: Collection[str]
    ) -> Mapping[str, Mapping[str, np.ndarray]]:
        """Return every layer's item by its name; ``hosts`` are those that there are."""
        if len(self.names) > 2 * len(hosts) + _LEFT:
            self._index, self.names = {}, []
            self._seen, self._encoded = {}, {}
        for name in sorted(hosts):
            self._number(name)
        for key in self._seen.keys() - layers.keys():
            del self._seen[key], self._encoded[item_name(key)]
        for key, placed in layers.items():
            # A placement is immutable, and shares the layers that a change leaves as they are.
            if self._seen.get(key) is not placed:
                self._seen[key] = placed
                self._encoded[item_name(key)] = self._encode(placed)
        return dict(self._encoded)

    def _encode(self, placed: LayerPlacement) -> Mapping[str, np.ndarray]:
        flat = [one for replicas in placed.replicas for one in replicas]
        shares = np.array([one.share for one in flat], dtype=float)
        return {
            "counts": small(np.array([len(one) for one in placed.replicas], dtype=np.int64)),
            "hosts": small(np.array([self._number(one.host) for one in flat], dtype=np.int64)),
            "shares": np.rint(shares * SHARE_UNITS).astype(np.uint16),
        }

    def _number(self, host: str) -> int:
        number = self._index.get(host)
        if number is None:
            number = self._index[host] = len(self.names)
            # A new list: the old one is part of an item.
            self.names = [*self.names, host]
        return number
