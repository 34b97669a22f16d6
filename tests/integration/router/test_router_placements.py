"""The router and placements that come late, name too little, or move experts and hosts.

Hosts are threads.
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from moesaic.actors.host.host import ExpertHost
from moesaic.cluster.expert_keys import ExpertKey, ExpertVersion, LayerKey, first_versions
from moesaic.cluster.placement import LayerPlacement, Placement, PlacementId, Replica
from moesaic.proto.errors import ExpertUnavailable
from tests.helpers.pool.serving import (
    EXPERTS,
    HASTY,
    KEY,
    LAYER,
    assert_right,
    in_background,
    inputs,
    serving,
)
from tests.helpers.pool.transports import settles


def test_a_call_waits_for_its_first_placement(folder: Path) -> None:
    with serving(folder) as pool, in_background() as start:
        router = pool.router(placed=False)
        x, ids, weights = inputs(6)
        ids[2, 0], ids[3, 0] = EXPERTS, -1
        call = start(router.forward, KEY, x, ids, weights)
        assert settles(lambda: router.stats().calls == 1)
        router.place(pool.placement)
        assert_right(call.result(30), pool.answer(x, ids, weights))


def test_an_unknown_layer_or_model_is_named(folder: Path) -> None:
    with serving(folder) as pool:
        hasty, router = pool.router(policy=HASTY), pool.router()
        x, ids, weights = inputs(2)
        for key in (LayerKey("m", 9), LayerKey("../../etc/passwd", LAYER)):
            with pytest.raises(ExpertUnavailable, match=f"of layer {key.layer} of {key.model}"):
                hasty.forward(key, x, ids, weights)
        assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))


def test_experts_move_between_hosts_in_the_middle_of_traffic(folder: Path) -> None:
    """An expert is evicted as soon as the newer placement is published, not before."""
    with serving(folder, hosts=3) as pool, in_background() as start:
        router = pool.router()
        over = threading.Event()

        def move_around() -> int:
            at = {expert: pool.holders(expert)[0] for expert in range(EXPERTS)}
            moves = 0
            while not over.is_set():
                key = ExpertKey("m", LAYER, moves % EXPERTS)
                old = at[key.expert]
                new = pool.hosts[(pool.hosts.index(old) + 1 + moves % 2) % 3]
                new.load([(pool.ref, pool.shape)], [ExpertVersion(key, 1)])
                at[key.expert] = new
                replicas = tuple((Replica(at[e].name, 1.0),) for e in range(EXPERTS))
                moves += 1
                router.place(
                    Placement(
                        PlacementId(1, 1 + moves),
                        pool.placement.hosts,
                        {**pool.placement.layers, KEY: LayerPlacement(replicas)},
                    )
                )
                old.release([ExpertVersion(key, 1)])
            return moves

        moving = start(move_around)
        try:
            for seed in range(200):
                x, ids, weights = inputs(1 + seed % 40, 1 + seed % 4, seed=seed)
                assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))
        finally:
            over.set()
        moves = moving.result(30)
        assert moves > 20
        assert router.stats().placement == PlacementId(1, 1 + moves)
        assert router.stats().rows_lost == 0


def test_a_restarted_host_is_reached_under_its_new_incarnation(folder: Path) -> None:
    with serving(folder) as pool, in_background() as start:
        router = pool.router()
        x, ids, weights = inputs(16)
        pool.hosts[0].close()
        call = start(router.forward, KEY, x, ids, weights)
        assert settles(lambda: router.stats().hosts["host-0"] != "up")
        again = ExpertHost("host-0", node="here", device="cpu")
        pool.stack.callback(again.close)
        keys = [
            ExpertKey("m", layer.layer, expert)
            for layer in pool.layers
            for expert in range(EXPERTS)
        ]
        again.load([(pool.ref, pool.shape)], first_versions(keys))
        entries = {**pool.placement.hosts, "host-0": again.entry()}
        assert not call.done()
        router.place(Placement(PlacementId(1, 2), entries, pool.placement.layers))
        assert_right(call.result(30), pool.answer(x, ids, weights))
