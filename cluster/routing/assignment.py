"""Choose the host that computes each assignment of a call.

First the planner's shares deal the assignments out to replicas (`choose_hosts`). Then hosts with
more than their part of a large call pass the excess on to other replicas (`level_load`). The second
step is needed because each call of a layer waits for its busiest host, and the shares are right
only on average over many calls.

Shape suffixes: E = experts of the layer, H = hosts in the placement's order, n = assignments.
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
    assignment_n: np.ndarray,
    routes: Routes,
    usable_H: np.ndarray,
    rank_H: np.ndarray,
    *,
    split_rows: int,
) -> np.ndarray:
    """Return for each assignment the index of a usable host that holds its expert, or -1.

    The placement's shares choose the host for each run of ``split_rows`` assignments of one expert.
    If that host is not usable, or not of the best rank, the run goes to usable hosts of the highest
    rank available. Then `level_load` evens out the load of hosts, in pieces of half a run. If the
    call's kind keeps rows together, all assignments of an expert go to the same host instead.
    """
    if not routes.hosts:
        return np.full(assignment_n.size, -1)  # no host is placed at the moment
    layer = routes.layer(call.key)
    ids_n = call.ids_N
    if assignment_n.size != ids_n.size:  # not all of the call, which would be in order
        ids_n = ids_n[assignment_n]
    # Shape (n,): the step of the shares' round robin (`LayerRoutes.table_ES`). It advances with
    # every call, and within a call after each run of `split_rows` assignments of one expert. Small
    # calls keep each expert's rows together on one replica.
    together = call.kind.together
    if call.tokens > split_rows and not together:
        step_n = call.rotation + rank_within_expert(ids_n) // split_rows
        host_n = layer.table_ES[ids_n, step_n % SHARE_STEPS]
    else:  # a token chooses an expert once
        step_n = None
        host_n = layer.by_step[call.rotation % SHARE_STEPS][ids_n]
    piece = max(split_rows // 2, 1)
    best_H = usable_H & (rank_H == BEST_RANK)
    if best_H.all() and not call.avoid:
        # Only experts without any replica have no host now.
        may_level = layer.has_load_shares and not together
        if may_level and host_n.size >= piece and host_n.min() >= 0:
            level_load(host_n, ids_n, layer, best_H, piece=piece)
        return host_n
    if step_n is None:
        step_n = np.full(ids_n.size, call.rotation)
    open_EH = layer.held_EH & usable_H  # replicas that can take calls
    for host, expert in call.avoid:
        if host in routes.index:
            open_EH[expert, routes.index[host]] = False
    first_EH = open_EH & best_H
    # Their shares name no host, or one that is not to be used while there is a better one.
    unserved = np.flatnonzero((host_n < 0) | ~first_EH[ids_n, host_n])
    for expert in np.unique(ids_n[unserved]):
        mine = unserved[ids_n[unserved] == expert]
        others = np.flatnonzero(open_EH[expert])
        if others.size:
            others = others[rank_H[others] == rank_H[others].max()]
        host_n[mine] = others[step_n[mine] % others.size] if others.size else -1
    if not together and not call.avoid and (host_n >= 0).all():
        level_load(host_n, ids_n, layer, best_H, piece=piece)
    return host_n


# Moves of pieces in one call are limited to this number for each host of the placement.
_MOST = 4


def level_load(
    host_n: np.ndarray, ids_n: np.ndarray, routes: LayerRoutes, open_H: np.ndarray, *, piece: int
) -> None:
    """Move assignments from hosts with more than their part of the call to other replicas.

    Changes ``host_n`` in place. Parts are ``routes.load_share_H``, scaled to the ``open_H`` hosts.
    It is greedy: each step relieves the host with the most assignments relative to its part, by its
    largest possible move. An expert's assignments on a host are not split into pieces smaller than
    ``piece``, and an excess below ``piece`` is left alone.
    """
    load_share_H = routes.load_share_H * open_H
    if not load_share_H.any():
        return
    hosts = len(load_share_H)
    wanted_H = load_share_H * (host_n.size / load_share_H.sum())  # sums to n, like rows_H
    rows_H = np.bincount(host_n, minlength=hosts)
    if (rows_H - wanted_H).max() < piece:
        return
    # Python numbers from here: the loop reads single elements, which is slow on numpy arrays.
    rows, wanted = rows_H.tolist(), wanted_H.tolist()
    # (E * H,): assignments of each expert on each host, at index expert * H + host.
    at_n = ids_n.astype(np.int64) * hosts + host_n
    mine_of = np.bincount(at_n, minlength=routes.held_EH.size).tolist()
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
                # `both` is the ratio rows / wanted of the two hosts together. Moving until `host`
                # is at that ratio evens them out, as `other` is at the same one then. Below a ratio
                # of 1 `host` would have less than its part, so it stops there.
                both = (rows[host] + rows[other]) / (wanted[host] + wanted[other])
                amount = min(mine, rows[host] - wanted[host] * max(1.0, both))
                if amount >= best:
                    best, found = amount, (expert, other, mine)
        if found is None:
            busy.discard(host)
            continue
        expert, other, mine = found
        # If less than a piece would stay behind, all of the expert's assignments move.
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
