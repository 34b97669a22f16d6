"""Which host computes which choice of a call.

Shape suffixes: E = experts of the layer, H = hosts in the placement's order, n = choices.
"""

from __future__ import annotations

import numpy as np

from .grouping import rank_within_expert
from .health import BEST_RANK
from .layer_call import LayerCall
from .levelling import level
from .routes import SHARE_STEPS, Routes


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
