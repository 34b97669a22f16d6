"""Which host computes which choice of a call.

Shape suffixes: E = experts of the layer, H = hosts in the placement's order, n = choices.
"""

from __future__ import annotations

import numpy as np

from .grouping import rank_within_expert
from .layer_call import LayerCall
from .placement import SHARE_STEPS, Placement


def choose_hosts(
    call: LayerCall,
    choices_n: np.ndarray,
    placement: Placement,
    usable_H: np.ndarray,
    welcome_H: np.ndarray,
    *,
    split_rows: int,
) -> np.ndarray:
    """For each choice the index of a usable host that holds its expert, or -1.

    The shares of the placement decide, in turns of ``split_rows`` choices of one expert. What they
    give to a host that is not usable, or not ``welcome_H`` while another one is, goes elsewhere.
    """
    if not usable_H.size:
        return np.full(choices_n.size, -1)  # nobody holds anything at the moment
    table = placement.tables[call.key]
    ids_n = call.ids_N[choices_n]
    step_n = np.full(ids_n.size, call.rotation)
    if ids_n.size > split_rows:
        step_n += rank_within_expert(ids_n) // split_rows
    host_n = table[ids_n, step_n % SHARE_STEPS].astype(np.int64)
    open_EH = placement.holders[call.key] & usable_H
    for host, expert in call.avoid:
        if host in placement.host_index:
            open_EH[expert, placement.host_index[host]] = False
    first_EH = open_EH & welcome_H
    unserved = np.flatnonzero((host_n < 0) | ~first_EH[ids_n, host_n])
    for expert in np.unique(ids_n[unserved]):
        mine = unserved[ids_n[unserved] == expert]
        others = np.flatnonzero(first_EH[expert])
        if not others.size:
            others = np.flatnonzero(open_EH[expert])
        host_n[mine] = others[step_n[mine] % others.size] if others.size else -1
    return host_n
