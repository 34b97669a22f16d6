"""Live moves on real actors: drains, pins, balancing and changes of controllers while a stream
runs, whose text never changes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import RayTaskError

from moesaic import Client
from moesaic.actors.runtime.ray_border import CONTROLLER, namespace_of
from moesaic.actors.store.cluster_secret import make_secret, router_key_of, secret_of
from moesaic.actors.store.durable_state import (
    claim_term,
    forget_all,
    store_constraints,
    stored_constraints,
)
from moesaic.cluster.planner.plan import OperatorConstraints
from moesaic.handle import Cluster
from moesaic.proto.errors import ClusterError
from tests.helpers.processes.live import (
    ON_RAY,
    replicas_of,
    term_of,
    text_in_background,
    text_of,
    wait_until,
)

MODEL = "m"
TOKENS = 150

pytestmark = ON_RAY


def wait_used(cluster: Cluster, host: str) -> None:
    """Until a host that was drained has its part again, and nothing is on its way."""
    wait_until(lambda: replicas_of(cluster)[host] > 0)
    wait_until(lambda: not cluster.status().balancing.pending_moves)


def test_a_constraint_is_a_change_that_ends_and_can_be_taken_back(
    pool: Cluster, client: Client
) -> None:
    wanted = text_of(client, MODEL, 20)
    # A host that was late for a while may have left replicas elsewhere.
    before = sum(replicas_of(pool).values())
    more, most = (3 - len(pool.experts(MODEL, 0)[expert].replicas) for expert in (1, 2))
    change = pool.wait_for(pool.replicate(MODEL, 0, 1, 3), 60)
    assert (change.phase, change.total_moves, change.errors) == ("done", more, [])
    assert more > 0
    assert change.reason == "3 replicas of expert 1 of layer 0 of m"
    assert sum(replicas_of(pool).values()) == before + more
    assert pool.replicate(MODEL, 0, 1, 3).id == change.id, "asked for again"
    for host in ("host-0", "host-1", "host-2"):
        change = pool.pin(MODEL, 0, 2, host)
    assert pool.wait_for(change, 60).phase == "done"
    assert sum(replicas_of(pool).values()) == before + more + most
    with pytest.raises(ClusterError, match="expert: 99 does not exist"):
        pool.pin(MODEL, 0, 99, "host-1")
    pool.replicate(MODEL, 0, 1, 1)
    for host in ("host-0", "host-1", "host-2"):
        pool.unpin(MODEL, 0, 2, host)
    assert text_of(client, MODEL, 20) == wanted


def test_a_drained_host_is_emptied_and_no_token_changes(pool: Cluster, client: Client) -> None:
    wanted = text_of(client, MODEL, TOKENS)
    assert min(replicas_of(pool).values()) > 0
    with text_in_background(client, MODEL, TOKENS) as text:
        assert pool.drain("host-1", timeout_s=60).phase == "done"
        assert text() == wanted
    assert replicas_of(pool)["host-1"] == 0
    assert pool.status().balancing.draining_hosts == ["host-1"]
    pool.undrain("host-1")
    with pytest.raises(ClusterError, match="host: 'nobody' does not exist; choose one of host-0"):
        pool.drain("nobody")
    wait_used(pool, "host-1")


def test_a_new_controller_has_a_higher_term_and_keeps_constraints(
    pool: Cluster, client: Client
) -> None:
    wanted = text_of(client, MODEL, TOKENS)
    pool.drain("host-2", timeout_s=60)
    term = pool.status().controller.term
    with text_in_background(client, MODEL, TOKENS) as text:
        controller: Any = ray.get_actor(CONTROLLER, namespace=namespace_of(pool.name))
        ray.kill(controller, no_restart=False)
        wait_until(lambda: term_of(pool) > term)
        wait_until(lambda: pool.status().placement is not None)
        assert text() == wanted
    status = pool.status()
    assert status.placement is not None
    assert status.placement.term == status.controller.term
    assert status.balancing.draining_hosts == ["host-2"]
    assert replicas_of(pool)["host-2"] == 0
    pool.undrain("host-2")
    wait_used(pool, "host-2")


def test_load_is_counted_and_rebalancing_follows_it(pool: Cluster, client: Client) -> None:
    for _ in range(4):
        text_of(client, MODEL, TOKENS)
    wait_until(lambda: bool(pool.status().routers))
    found = pool.plan()
    assert found.balancedness_before is not None
    assert found.balancedness_after is not None
    assert found.balancedness_after.mean >= found.balancedness_before.mean - 1e-6
    wanted = text_of(client, MODEL, TOKENS)
    with text_in_background(client, MODEL, TOKENS) as text:
        change = pool.rebalance(budget=20)
        wait_until(lambda: pool.change(change.id).phase != "loading")
        assert text() == wanted
    done = pool.change(change.id)
    assert done.phase == "done"
    assert pool.history()[-1].id == change.id
    pool.rollback(change.id)
    assert pool.change(change.id).phase == "rolled_back"
    wait_until(lambda: not pool.status().balancing.pending_moves)
    assert text_of(client, MODEL, TOKENS) == wanted


def test_another_process_may_operate_the_cluster(pool: Cluster) -> None:
    def run(*words: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "moesaic.cli.main", *words, "--name", pool.name, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert np.isfinite(run("plan")["balancedness_after"]["mean"])
    assert run("replicate", "0", "3", "-n", "3")["phase"] == "done"
    assert run("replicate", "0", "3", "-n", "1")["total_moves"] == 0


def test_terms_only_grow_and_are_forgotten_with_their_cluster(pool: Cluster) -> None:
    first, second = claim_term("other"), claim_term("other")
    assert second > first
    store_constraints("other", OperatorConstraints(leaving=frozenset({"h"})))
    assert stored_constraints("other").leaving == {"h"}
    forget_all("other")
    assert stored_constraints("other") == OperatorConstraints()


def test_a_secret_is_new_for_each_cluster_and_goes_with_it(pool: Cluster) -> None:
    first = make_secret("other")
    assert secret_of("other").reveal() == first.reveal()
    assert router_key_of("other") == first.router_key
    second = make_secret("other", "a key of the user")
    assert second.reveal() != first.reveal()
    assert secret_of("other").reveal() == second.reveal()
    assert router_key_of("other") == "a key of the user"
    forget_all("other")
    for read in (secret_of, router_key_of):
        with pytest.raises(ClusterError, match="its secret is not in Ray's key-value store"):
            read("other")


def test_an_old_controller_is_refused_by_hosts(pool: Cluster) -> None:
    host: Any = ray.get_actor("host-0", namespace=namespace_of(pool.name))
    with pytest.raises(RayTaskError, match="Superseded"):
        ray.get(host.load.remote([], [], term=1), timeout=30)
    with pytest.raises(RayTaskError, match="Superseded"):
        ray.get(host.release.remote([], term=1), timeout=30)
    with pytest.raises(RayTaskError, match="Superseded"):
        ray.get(host.report.remote(1, 0), timeout=30)
