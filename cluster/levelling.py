"""The choices of one call, evenly over its hosts.

A layer waits for its busiest host, call by call. The planner's shares are right in the mean: what
one call asks for differs by chance, and more when the traffic has shifted or a host was lost. So
what is above a host's part goes to other replicas, in as few and as large pieces as will do.
(DeepSeek's LPLB solves a linear program for each batch to the same end.)

Shape suffixes: H = hosts in the placement's order, n = choices.
"""

from __future__ import annotations

import math

import numpy as np

from .routes import LayerRoutes

# Pieces that may move in one call, for each host.
_MOST = 4


def level(
    host_n: np.ndarray, ids_n: np.ndarray, routes: LayerRoutes, open_H: np.ndarray, *, piece: int
) -> None:
    """Take choices from hosts that have more than their part of the call and give them to other
    ``open_H`` hosts of their experts, in place; by turns, the host that has the most for its part
    first. Parts are ``routes.part_H``, as far as hosts are open. An expert's choices are not torn
    into pieces smaller than ``piece``, and so much too much is even."""
    part_H = routes.part_H * open_H
    if not part_H.any():
        return
    hosts = len(part_H)
    wanted_H = part_H * (host_n.size / part_H.sum())
    rows_H = np.bincount(host_n, minlength=hosts)
    if (rows_H - wanted_H).max() < piece:
        return
    # Plain numbers from here: what follows looks at few of them, one by one.
    rows, wanted = rows_H.tolist(), wanted_H.tolist()
    mine_of = np.bincount(ids_n * hosts + host_n, minlength=routes.held_EH.size).tolist()
    busy = {host for host in range(hosts) if rows[host] - wanted[host] >= piece}
    moves: list[tuple[int, int, int, int]] = []
    while busy and len(moves) < _MOST * hosts:
        host = max(busy, key=lambda h: rows[h] / wanted[h] if wanted[h] else math.inf)
        best, found = float(piece), None
        for expert, others in routes.movable[host]:
            mine = mine_of[expert * hosts + host]
            if mine < best:
                continue
            for other in others:
                if wanted[other] <= 0:
                    continue
                # No further than to where both have the same part of what they are to have.
                both = (rows[host] + rows[other]) / (wanted[host] + wanted[other])
                amount = min(mine, rows[host] - wanted[host] * max(1.0, both))
                if amount >= best:
                    best, found = amount, (expert, other, mine)
        if found is None:
            busy.discard(host)
            continue
        expert, other, mine = found
        amount = mine if mine - best < piece else int(best)
        rows[host] -= amount
        rows[other] += amount
        mine_of[expert * hosts + host] -= amount
        mine_of[expert * hosts + other] += amount
        moves.append((expert, host, other, amount))
        if rows[other] - wanted[other] >= piece:
            busy.add(other)
        if rows[host] - wanted[host] < piece:
            busy.discard(host)
    for expert, host, other, amount in moves:
        host_n[np.flatnonzero((ids_n == expert) & (host_n == host))[:amount]] = other
