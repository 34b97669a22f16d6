"""What levelling a call's choices over its hosts gives: the router's own choice of hosts, for calls
drawn from a skewed load, by the planner's shares alone and levelled call by call.

    python -m benchmarks.planning.levelling [--json PATH]

`busiest` is the busiest host's choices over the mean's, in the mean of the calls. The placement is
planned for the load (`as planned`), for another one (`shifted`: what routers see until the
controller has moved replicas), or has just lost a host (`host lost`, with redundancy 1).

Shape suffixes: E = experts, H = hosts, N = tokens * top_k choices.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import write_json
from benchmarks.planning.placing import LAVISH, MODEL, Pool
from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.placement import HostEntry, LayerPlacement, Placement, PlacementId
from moesaic.cluster.planner.plan import PoolHost
from moesaic.cluster.planner.planner import plan
from moesaic.cluster.routing.assignment import choose_hosts
from moesaic.cluster.routing.host_health import BEST_RANK
from moesaic.cluster.routing.layer_call import FORWARD, LayerCall
from moesaic.cluster.routing.policy import RouterPolicy
from moesaic.cluster.routing.routes import Routes

KEY = LayerKey(MODEL, 0)


@dataclass(frozen=True, kw_only=True)
class Case:
    experts: int
    hosts: int
    slots: int  # of each host
    top_k: int
    tokens: int
    skew: float  # Zipf's exponent; 0: all experts alike
    what: str = "as planned"


@dataclass(frozen=True, kw_only=True)
class Row(Case):
    by_shares: float
    levelled: float
    moved: float  # part of the choices that levelling gives to another host
    us: float  # a call's choice of hosts takes, levelled
    us_more: float  # of it for levelling


CASES = [
    Case(experts=64, hosts=8, slots=10, top_k=8, tokens=tokens, skew=skew, what=what)
    for skew, what in ((0.0, "as planned"), (1.0, "as planned"), (1.0, "shifted"))
    for tokens in (32, 512)
] + [
    Case(experts=64, hosts=8, slots=18, top_k=8, tokens=512, skew=1.0, what="host lost"),
    Case(experts=256, hosts=32, slots=9, top_k=8, tokens=2048, skew=1.0),
    Case(experts=256, hosts=32, slots=18, top_k=8, tokens=2048, skew=1.0, what="host lost"),
]


def drawn(rng: np.random.Generator, weight_E: np.ndarray, tokens: int, top_k: int) -> np.ndarray:
    """(tokens * top_k,) expert ids, those of a token distinct, in the proportion of the weights as
    far as that allows (Gumbel's top-k)."""
    noise = rng.gumbel(size=(tokens, weight_E.size))
    return np.argpartition(np.log(weight_E) + noise, -top_k, axis=1)[:, -top_k:].ravel()


def routes(case: Case, load_E: np.ndarray) -> tuple[Routes, Routes]:
    """Those of the placement planned for a load: by shares alone, and with each host's part."""
    pool = Pool(layers=1, experts=case.experts, hosts=case.hosts, slots=case.slots)
    policy = replace(LAVISH, redundancy=1 if case.what == "host lost" else 0)
    hosts: list[PoolHost] = pool.pool
    found = plan(
        models=[pool.shape], hosts=hosts, current={}, loads={KEY: load_E}, policy=policy
    ).layers[KEY]  # fmt: skip
    shares = LayerPlacement(found.replicas)
    return _routes(shares, hosts), _routes(found, hosts)


def _routes(layer: LayerPlacement, hosts: list[PoolHost]) -> Routes:
    entries = {
        host.name: HostEntry(
            host=host.name, incarnation=1, node="n", shm_address="", grpc_address=host.name
        )
        for host in hosts
    }
    return Routes(Placement(id=PlacementId(1, 1), hosts=entries, layers={KEY: layer}))


def measure(case: Case, calls: int) -> Row:
    rng = np.random.default_rng(0)
    weight_E = rng.permutation(np.arange(1, case.experts + 1) ** -case.skew)
    sample = drawn(rng, weight_E, 20_000, case.top_k)
    shares, levelled = routes(case, np.bincount(sample, minlength=case.experts).astype(float))
    if case.what == "shifted":
        weight_E = rng.permutation(weight_E)
    usable_H = np.ones(len(shares.hosts), dtype=bool)
    usable_H[0] = case.what != "host lost"
    rank_H = np.full(usable_H.size, BEST_RANK)
    busiest: dict[str, list[float]] = {"shares": [], "levelled": []}
    seconds: dict[str, list[float]] = {"shares": [], "levelled": []}
    moved = []
    for rotation in range(calls):
        ids_N = drawn(rng, weight_E, case.tokens, case.top_k)
        all_N = np.arange(ids_N.size)
        call = LayerCall(
            number=1, kind=FORWARD, key=KEY, top_k=case.top_k, max_rows=ids_N.size,
            deadline=1.0, rotation=rotation,
            ids_N=ids_N, waiting_N=all_N,
        )  # fmt: skip
        hosts_N = {}
        for way, table in (("shares", shares), ("levelled", levelled)):
            began = time.perf_counter()
            host_N = choose_hosts(
                call, all_N, table, usable_H, rank_H, split_rows=RouterPolicy().split_rows
            )
            seconds[way].append(time.perf_counter() - began)
            assert (host_N >= 0).all()
            rows_H = np.bincount(host_N, minlength=usable_H.size)
            busiest[way].append(float(rows_H.max() / rows_H[usable_H].mean()))
            hosts_N[way] = host_N
        moved.append(float((hosts_N["shares"] != hosts_N["levelled"]).mean()))
    us = {way: 1e6 * statistics.median(found) for way, found in seconds.items()}
    return Row(
        **asdict(case),
        by_shares=statistics.fmean(busiest["shares"]),
        levelled=statistics.fmean(busiest["levelled"]),
        moved=statistics.fmean(moved),
        us=us["levelled"],
        us_more=us["levelled"] - us["shares"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [measure(case, args.calls) for case in CASES]
    table = Table(title="the busiest host of a call, over the mean")
    for column in ("experts", "hosts", "choices", "Zipf", "", "by shares", "levelled", "moved",
                   "choosing us", "of it levelling"):  # fmt: skip
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row.experts}", f"{row.hosts}", f"{row.tokens * row.top_k:,}", f"{row.skew:g}",
            row.what, f"{row.by_shares:.3f}", f"{row.levelled:.3f}", f"{row.moved:.1%}",
            f"{row.us:.0f}", f"{row.us_more:.0f}",
        )  # fmt: skip
    Console(width=120).print(table)
    write_json(args.json, {"calls": args.calls, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
