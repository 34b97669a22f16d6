"""Which host computes which choice of a call.

A call's choices are dealt out by the planner's shares (`choose_hosts`). What a host then has above
its part of a large call goes to other replicas (`level`): a layer waits for its busiest host, call
by call, and the planner's shares are right in the mean only.

Shape suffixes: E = experts of the layer, H = hosts in the placement's order, n = choices.
"""

from __future__ import annotations

import math

import numpy as np

from .host_health import BEST_RANK
from .layer_call import LayerCall
from .routes import SHARE_STEPS, LayerRoutes, Routes
from .row_grouping import rank_within_expert


def choose_hosts(
    call: LayerCall,
    choices_n: np.ndarray,
    routes: Routes,
    usable_H: np.ndarray,
    rank_H: np.ndarray,
    *,
    split_rows: int,
) -> np.ndarray:
    """For each choice the index of a usable host that holds its expert, or -1.

    The shares of the placement decide, in turns of ``split_rows`` choices of one expert. What they
    give to a host that is not usable, or not of the best rank, goes to the usable ones of the best
    rank that there is. What makes one host busier than others is handed on, in pieces of half as
    many choices.
    """
    if not usable_H.size:
        return np.full(choices_n.size, -1)  # nobody holds anything at the moment
    layer = routes.layer(call.key)
    ids_n = call.ids_N[choices_n]
    step_n = np.full(ids_n.size, call.rotation)
    if ids_n.size > split_rows:
        step_n += rank_within_expert(ids_n) // split_rows
    host_n = layer.table_ES[ids_n, step_n % SHARE_STEPS].astype(np.int64)
    open_EH = layer.held_EH & usable_H
    for host, expert in call.avoid:
        if host in routes.index:
            open_EH[expert, routes.index[host]] = False
    first_EH = open_EH & (rank_H == BEST_RANK)
    unserved = np.flatnonzero((host_n < 0) | ~first_EH[ids_n, host_n])
    for expert in np.unique(ids_n[unserved]):
        mine = unserved[ids_n[unserved] == expert]
        others = np.flatnonzero(open_EH[expert])
        if others.size:
            others = others[rank_H[others] == rank_H[others].max()]
        host_n[mine] = others[step_n[mine] % others.size] if others.size else -1
    if not call.avoid and (host_n >= 0).all():
        piece = max(split_rows // 2, 1)
        level(host_n, ids_n.astype(np.int64), layer, usable_H & (rank_H == BEST_RANK), piece=piece)
    return host_n


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
