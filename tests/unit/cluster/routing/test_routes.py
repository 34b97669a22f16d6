"""What routers look up: shares as tables; and how a call is levelled over its hosts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.placement import LayerPlacement, ModelShape, Placement, PlacementId, Replica
from moesaic.cluster.planner.plan import PlannerPolicy, PoolHost
from moesaic.cluster.planner.planner import plan
from moesaic.cluster.routing.assignment import choose_hosts, level_load
from moesaic.cluster.routing.host_health import BEST_RANK
from moesaic.cluster.routing.layer_call import FORWARD, LayerCall
from moesaic.cluster.routing.routes import SHARE_STEPS, LayerRoutes, Routes
from tests.helpers.cluster.worlds import entry

KEY = LayerKey("m", 0)
SPLIT_ROWS = 16
PIECE = SPLIT_ROWS // 2


def routed(*experts: tuple[Replica, ...]) -> Routes:
    hosts = sorted({replica.host for replicas in experts for replica in replicas})
    layers = {KEY: LayerPlacement(experts)}
    return Routes(Placement(PlacementId(1, 1), {h: entry(h) for h in hosts}, layers))


# ---- shares -------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, derandomize=True)
@given(weights=st.lists(st.floats(0.0, 10.0), min_size=1, max_size=6))
def test_tables_keep_shares_to_within_one_step(weights: list[float]) -> None:
    replicas = tuple(Replica(f"h{n}", weight) for n, weight in enumerate(weights))
    routes = routed(replicas)
    steps = routes.layer(KEY).table_ES[0]
    assert steps.shape == (SHARE_STEPS,) == (64,)
    total = sum(weights)
    for n, weight in enumerate(weights):
        share = weight / total if total else 1 / len(weights)
        given_steps = int((steps == routes.index[f"h{n}"]).sum())
        assert abs(given_steps / 64 - share) <= 1 / 64 + 1e-9


def test_a_run_of_steps_has_nearly_the_shares_of_the_whole() -> None:
    """Small calls follow one another through the table: no replica may come in one lump."""
    routes = routed((Replica("h0", 0.5), Replica("h1", 0.25), Replica("h2", 0.25)))
    steps = routes.layer(KEY).table_ES[0]
    for start in range(0, 64, 8):
        counts = np.bincount(steps[start : start + 8], minlength=3)
        assert np.abs(counts - [4, 2, 2]).max() <= 1


def test_an_expert_without_a_replica_has_a_table_of_nobody() -> None:
    routes = routed((Replica("h0", 1.0),), ())
    assert (routes.layer(KEY).table_ES[1] == -1).all()
    assert routes.layer(KEY).held_EH.tolist() == [[True], [False]]


def test_hosts_are_numbered_by_name_and_holders_agree_with_the_tables() -> None:
    routes = routed((Replica("h2", 0.9), Replica("h0", 0.1)), (Replica("h1", 1.0),))
    assert routes.hosts == ["h0", "h1", "h2"]
    assert routes.layer(KEY).held_EH.tolist() == [[True, False, True], [False, True, False]]
    assert set(routes.layer(KEY).table_ES[0].tolist()) == {0, 2}
    assert set(routes.layer(KEY).table_ES[1].tolist()) == {1}


# ---- levelling ----------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """A call; every choice is with a holder of its expert."""

    routes: LayerRoutes
    ids_n: np.ndarray
    host_n: np.ndarray
    open_H: np.ndarray


def levelled(drawn: Drawn) -> np.ndarray:
    host_n = drawn.host_n.copy()
    level_load(host_n, drawn.ids_n, drawn.routes, drawn.open_H, piece=PIECE)
    return host_n


@st.composite
def calls(draw: st.DrawFn) -> Drawn:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    experts, hosts = draw(st.integers(1, 24)), draw(st.integers(1, 8))
    held_EH = rng.random((experts, hosts)) < draw(st.floats(0.0, 1.0))
    held_EH[np.arange(experts), rng.integers(0, hosts, experts)] = True
    ids_n = rng.choice(experts, draw(st.integers(1, 1500)), p=rng.dirichlet(np.ones(experts)))
    host_n = np.array([rng.choice(np.flatnonzero(held_EH[expert])) for expert in ids_n])
    table_ES = np.zeros((experts, SHARE_STEPS), dtype=np.int16)
    open_H = rng.random(hosts) < 0.8
    load_share_H = rng.dirichlet(np.ones(hosts)) * (rng.random(hosts) < 0.9)
    return Drawn(LayerRoutes(table_ES, held_EH, load_share_H), ids_n, host_n, open_H)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(drawn=calls())
def test_levelling_takes_from_the_busy_and_gives_to_holders_that_take_calls(
    drawn: Drawn,
) -> None:
    routes, ids_n, before_n, open_H = drawn
    host_n = levelled(drawn)
    moved = host_n != before_n
    assert routes.held_EH[ids_n, host_n].all()
    assert open_H[host_n[moved]].all()
    assert (routes.load_share_H[host_n[moved]] > 0).all()
    load_share_H = routes.load_share_H * open_H
    if not load_share_H.any():
        assert not moved.any()
        return
    wanted_H = load_share_H / load_share_H.sum() * ids_n.size

    def most(host_n: np.ndarray) -> float:
        """The busiest host: its load for what it is to have."""
        rows_H = np.bincount(host_n, minlength=len(load_share_H))
        return float((rows_H / np.maximum(wanted_H, 1e-300)).max())

    # A piece is moved whole where less than a piece would be left.
    slack = PIECE / wanted_H[load_share_H > 0].min()
    assert most(host_n) <= max(most(before_n), 1.0) + slack


@settings(max_examples=300, deadline=None, derandomize=True)
@given(drawn=calls())
def test_no_expert_is_torn_into_small_pieces(
    drawn: Drawn,
) -> None:
    routes, ids_n, before_n, open_H = drawn
    host_n = levelled(drawn)
    hosts = len(open_H)

    def pieces(host_n: np.ndarray) -> np.ndarray:
        return np.bincount(ids_n * hosts + host_n, minlength=routes.held_EH.size)

    before, after = pieces(before_n), pieces(host_n)
    assert (after[(before == 0) & (after > 0)] >= PIECE).all()
    assert (after[(before >= PIECE) & (after > 0)] >= PIECE).all()


def pool(hosts: int, experts: int, *, redundancy: int) -> Routes:
    names = [f"h{n}" for n in range(hosts)]
    found = plan(
        models=[ModelShape(model="m", experts={0: experts})],
        hosts=[PoolHost(name=name) for name in names],
        current={},
        loads={},
        policy=PlannerPolicy(redundancy=redundancy),
    )
    return Routes(Placement(PlacementId(1, 1), {n: entry(n) for n in names}, found.layers))


def chosen(routes: Routes, ids_TK: np.ndarray, *, lost: int | None = None) -> np.ndarray:
    """(hosts,): assignments of one call on each host."""
    ids_N = ids_TK.reshape(-1).astype(np.int32)
    call = LayerCall(
        number=1,
        kind=FORWARD,
        key=KEY,
        top_k=ids_TK.shape[1],
        max_rows=4096,
        deadline=1.0,
        rotation=3,
        ids_N=ids_N,
        waiting_N=np.arange(ids_N.size),
    )
    open_H = np.arange(len(routes.hosts)) != lost
    rank_H = np.full(len(open_H), BEST_RANK)
    host_n = choose_hosts(call, call.waiting_N, routes, open_H, rank_H, split_rows=SPLIT_ROWS)
    return np.bincount(host_n, minlength=len(routes.hosts))


@pytest.mark.parametrize("lost", [None, 2])
@pytest.mark.parametrize("skewed", [False, True])
def test_a_large_call_is_even_whatever_it_asks_for_and_whoever_is_lost(
    lost: int | None, skewed: bool
) -> None:
    """No placement has to come for it, so a lost host costs its own part and not its partners'."""
    rng = np.random.default_rng(1)
    routes = pool(8, 64, redundancy=1)
    load_E = rng.lognormal(0.0, 0.3, 64) if skewed else np.ones(64)
    ids_TK = rng.choice(64, (512, 8), p=load_E / load_E.sum())
    rows_H = chosen(routes, ids_TK, lost=lost)
    even = ids_TK.size / (8 if lost is None else 7)
    assert rows_H.max() < even + 2 * PIECE
    if lost is not None:
        assert rows_H[lost] == 0


def test_small_calls_go_by_shares_alone() -> None:
    """Where an expert has a few tokens, reading its weights is the work, and pieces cost more."""
    rng = np.random.default_rng(2)
    routes = pool(4, 32, redundancy=1)
    ids_TK = rng.integers(0, 32, (8, 2))
    by_shares_H = np.bincount(routes.layer(KEY).table_ES[ids_TK.reshape(-1), 3], minlength=4)
    assert chosen(routes, ids_TK).tolist() == by_shares_H.tolist()


def test_without_parts_shares_decide_alone() -> None:
    routes = routed((Replica("h0", 1.0), Replica("h1", 0.0)))
    assert chosen(routes, np.zeros((200, 1), dtype=np.int32)).tolist() == [200, 0]
