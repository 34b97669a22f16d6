"""Consolidate the load of a layer on fewer hosts and fewer replicas.

Each host that a layer's call touches costs a message. Each replica that takes part of an expert's
tokens reads the expert's weights once more, however few tokens they are. So load is gathered on
fewer hosts and replicas, up to a level of load / speed below which evenness is worth nothing.

Shapes: E experts of one layer, H hosts.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .balance import water_fill

# The busiest host may exceed the mean by this fraction if fewer replicas then have traffic.
_EASE = 0.005


def consolidation_level(loads: Iterable[np.ndarray], speed_H: np.ndarray, part: float) -> float:
    """Return the load / speed of a layer on a host up to which it is not spread over more hosts.

    It is ``part`` of the mean load / speed of the layer with the most load.
    """
    heaviest = max((float(load_E.sum()) for load_E in loads), default=0.0)
    return part * heaviest / float(speed_H.sum())


def consolidate(
    flow_EH: np.ndarray,
    held_EH: np.ndarray,
    speed_H: np.ndarray,
    least: float,
    use_H: np.ndarray,
) -> np.ndarray:
    """Return the loads ``flow_EH`` of the replicas ``held_EH`` on fewer hosts and replicas, (E, H).

    First whole hosts are freed of this layer while the others stay below ``least`` (load / speed);
    the hosts that other layers use most (``use_H``, load / speed) come first. Then single replicas
    are freed, the smallest load first, while no host exceeds the largest of three levels: the
    busiest host's now, ``least``, and a little above the mean.
    """
    gathered_EH = flow_EH.copy()
    load_H = gathered_EH.sum(axis=0)
    mean = float(load_H.sum() / speed_H.sum())
    level = max(float((load_H / speed_H).max()), mean * (1 + _EASE), least)
    if mean < least:
        open_EH = held_EH.copy()
        for host in np.argsort(-use_H, kind="stable"):
            _spare_host(gathered_EH, load_H, open_EH, int(host), least * speed_H, speed_H)
    with_load_EH = gathered_EH > 0
    split_E = with_load_EH.sum(axis=1) > 1
    pieces = [
        (float(gathered_EH[e, h]), e, h) for e, h in np.argwhere(with_load_EH & split_E[:, None])
    ]
    for _, expert, host in sorted(pieces):
        others = np.flatnonzero(gathered_EH[expert] > 0)
        _hand_over(gathered_EH, load_H, expert, host, others, level * speed_H, speed_H)
    return gathered_EH


def _spare_host(
    flow_EH: np.ndarray,
    load_H: np.ndarray,
    open_EH: np.ndarray,
    host: int,
    most_H: np.ndarray,
    speed_H: np.ndarray,
) -> None:
    """Take all load off a host and its replicas out of ``open_EH``, or change nothing."""
    tried_EH, tried_H = flow_EH.copy(), load_H.copy()
    for expert in np.flatnonzero(flow_EH[:, host] > 0):
        others = np.flatnonzero(open_EH[expert])
        if not _hand_over(tried_EH, tried_H, int(expert), host, others, most_H, speed_H):
            return
    flow_EH[:], load_H[:] = tried_EH, tried_H
    open_EH[:, host] = False


def _hand_over(
    flow_EH: np.ndarray,
    load_H: np.ndarray,
    expert: int,
    host: int,
    others: np.ndarray,
    most_H: np.ndarray,
    speed_H: np.ndarray,
) -> bool:
    """Give an expert's load on ``host`` to the ``others``; return False if they lack room.

    ``most_H`` is the highest load of each host.
    """
    amount = float(flow_EH[expert, host])
    others = others[others != host]
    if amount > np.maximum(most_H[others] - load_H[others], 0.0).sum():
        return False
    poured = water_fill(amount, load_H[others], speed_H[others])
    flow_EH[expert, others] += poured
    flow_EH[expert, host] = 0.0
    load_H[others] += poured
    load_H[host] -= amount
    return True
