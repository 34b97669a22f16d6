"""Hosts that lend their experts, and routers that borrow them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from moesaic.actors.host.host import ExpertHost
from moesaic.actors.router.router import Router
from moesaic.cluster.expert_keys import ExpertKey, ExpertVersion
from moesaic.cluster.placement import LayerPlacement, Placement, PlacementId, Replica
from moesaic.cluster.routing.policy import RouterPolicy
from tests.helpers.pool.serving import (
    EXPERTS,
    KEY,
    LAYER,
    PATIENT,
    Hosts,
    serving,
)
from tests.helpers.pool.transports import settles

SPLITS = replace(PATIENT, splits_lent=True)  # as with `lending: auto`


def borrowing(pool: Hosts, *hosts: str, policy: RouterPolicy = PATIENT) -> Router:
    """A router that has heard what these hosts lend."""
    router = pool.router(borrows=True, policy=policy)
    heard(router, *hosts)
    return router


def heard(router: Router, *hosts: str) -> None:
    def all_lent() -> bool:
        router._look_after([])
        return router._lent_experts.lenders == set(hosts)

    assert settles(all_lent)


def computed(pool: Hosts) -> int:
    """Calls that hosts have computed."""
    return sum(host.report().loop.calls for host in pool.hosts)


@contextmanager
def half_lent(folder: Path, *, exact: bool, **options: Any) -> Iterator[tuple[Hosts, Router]]:
    """Two hosts, of which one lends; it has all other layers alone."""
    with serving(folder, hosts=1, lends=True, exact=exact, **options) as lender:
        other = ExpertHost("other", node="here", device="cpu")
        try:
            kept = list(range(0, EXPERTS, 2))
            sent = [ExpertVersion(ExpertKey("m", KEY.layer, e), 1) for e in range(1, EXPERTS, 2)]
            other.load([(lender.ref, lender.shape)], sent)
            here = lender.hosts[0].name
            replicas = tuple(
                (Replica(here if e in kept else "other", 1.0),) for e in range(EXPERTS)
            )
            placement = Placement(
                PlacementId(1, 2),
                {**lender.placement.hosts, "other": other.entry()},
                {**lender.placement.layers, KEY: LayerPlacement(replicas)},
                lender.placement.exact,
            )
            pool = replace(lender, hosts=[*lender.hosts, other], placement=placement)
            yield pool, borrowing(pool, here)
        finally:
            other.close()


def key(expert: int) -> ExpertKey:
    return ExpertKey("m", LAYER, expert)


def mapped() -> int:
    """Slabs of other processes that are mapped here."""
    gc.collect()
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum("memfd:moesaic:m " in line and line.split()[1][1] == "-" for line in lines)
