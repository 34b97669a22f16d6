"""Hosts that are slower than they should be: what their answers say of their work.

Small calls take more time for each choice than large ones, so paces of healthy hosts differ too;
only a host that is far behind the others counts as slow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from .plan import PoolHost

_HORIZON_S = 60.0
# Below this part of the others' pace a host is slow; without so many answers nothing is said.
_SLOW = 1 / 3
_LEAST_CALLS = 20


@dataclass(slots=True)
class _Lately:
    calls: float = 0.0
    choices: float = 0.0
    busy_s: float = 0.0


class Paces:
    """Choices per second of work of each host, over the last minute or so."""

    def __init__(self) -> None:
        self._lately: dict[str, _Lately] = {}

    def hear(self, host: str, calls: int, choices: int, busy_s: float) -> None:
        lately = self._lately.setdefault(host, _Lately())
        lately.calls += calls
        lately.choices += choices
        lately.busy_s += busy_s

    def advance(self, window_s: float) -> None:
        keep = math.exp(-window_s / _HORIZON_S)
        for lately in self._lately.values():
            lately.calls *= keep
            lately.choices *= keep
            lately.busy_s *= keep

    def slowness(self, speeds: Mapping[str, float]) -> dict[str, float]:
        """The part of its speed that each slow host has; hosts that are not slow are not named."""
        paces = {
            host: lately.choices / lately.busy_s / speeds[host]
            for host, lately in self._lately.items()
            if host in speeds and lately.calls >= _LEAST_CALLS and lately.busy_s > 0
        }
        if len(paces) < 2:
            return {}
        usual = median(paces.values())
        return {host: pace / usual for host, pace in paces.items() if pace < _SLOW * usual}

    def slowed(self, hosts: Sequence[PoolHost]) -> list[PoolHost]:
        """The hosts with the speeds that they really have."""
        slow = self.slowness({host.name: host.speed for host in hosts})
        return [replace(host, speed=host.speed * slow.get(host.name, 1.0)) for host in hosts]
