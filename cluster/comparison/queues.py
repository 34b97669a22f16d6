"""Hosts as fluid queues: the load that a host cannot compute at once waits.

Shape: H hosts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Queues:
    """The assignments that wait at each host, by its name."""

    def __init__(self) -> None:
        self._waiting: dict[str, float] = {}

    def advance(
        self, hosts: Sequence[str], arrived_H: np.ndarray, speed_H: np.ndarray, seconds: float
    ) -> tuple[float, np.ndarray]:
        """Let ``seconds`` pass in which ``arrived_H`` assignments arrive.

        Returns (seconds that the longest queue then takes, assignments computed by each host (H,)).
        Hosts that are no longer named are gone, and what waited there is dropped.
        """
        waiting_H = np.array([self._waiting.get(host, 0.0) for host in hosts]) + arrived_H
        computed_H = np.minimum(waiting_H, speed_H * seconds)
        waiting_H -= computed_H
        self._waiting = dict(zip(hosts, waiting_H.tolist(), strict=True))
        return float((waiting_H / speed_H).max(initial=0.0)), computed_H
