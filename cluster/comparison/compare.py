"""Compare placement strategies on the same loads, with the same hosts, on a virtual clock.

Shapes: W windows of a trace, H hosts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..control.control import ControlPolicy
from ..load.trace import Trace
from ..placement import ModelShape
from ..planner.balance import balancedness
from ..planner.plan import PlannerPolicy, PoolHost
from .elastic_placement import Elastic, MoesaicStrategy
from .loads import daily_trace
from .placement_strategies import Eplb, PlacementStrategy, Pool, Static


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyResult:
    """The results of one strategy; the first windows, in which all learn, do not count."""

    strategy: str
    balancedness_mean: float  # over windows and layers
    balancedness_worst: float  # of any layer in any window
    moved_slots: int
    moved_bytes: int
    slo_violations: int  # windows in which the delay of some host's queue exceeded the SLO
    windows: int
    host_hours: float  # from the request for a host to its end
    cost: float  # of the host hours
    scale_events: int  # changes of the number of hosts
    # These have all windows, the first ones too.
    balancedness_W: tuple[float, ...]  # mean over layers
    moved_W: tuple[int, ...]  # slots
    hosts_W: tuple[float, ...]  # mean number of hosts in each window


def compare(
    trace: Trace,
    pool: Pool,
    *,
    every: int,
    slo_s: float,
    policy: ControlPolicy,
    ticks: int = 20,
    elastic: Elastic | None = None,
) -> list[StrategyResult]:
    """Run the static placement, EPLB every ``every`` windows, and ours over a trace.

    With ``elastic``, ours with the autoscaler runs too. Raises ValueError if a layer has more
    experts than slots.
    """
    ways: list[PlacementStrategy] = [
        Static(pool),
        Eplb(pool, every=every),
        MoesaicStrategy(pool, policy, ticks=ticks),
    ]
    if elastic is not None:
        ways.append(MoesaicStrategy(pool, policy, ticks=ticks, elastic=elastic))
    cost_per_hour = 1.0 if elastic is None else elastic.cost_per_hour
    return [
        _figures(way, trace, skip=every, slo_s=slo_s, cost_per_hour=cost_per_hour) for way in ways
    ]


def control_policy(pool: Pool, *, every_s: float, budget: float, redundancy: int) -> ControlPolicy:
    """Return the policy of a controller that checks the load every ``every_s`` of a trace."""
    return ControlPolicy(
        balance=PlannerPolicy(
            redundancy=redundancy,
            loading_bytes_per_s=pool.loading_bytes_per_s,
            horizon_s=max(60.0, every_s),
        ),
        every_s=every_s,
        budget=budget,
        bytes_per_s=pool.loading_bytes_per_s,
    )


def pool_of(
    shapes: Sequence[ModelShape],
    *,
    hosts: int,
    slots: int,
    assignments_per_s: float,
    loading_bytes_per_s: float,
) -> Pool:
    """Make a pool of equal hosts with ``slots`` for each layer.

    Raises ValueError if these are too few for a layer's experts.
    """
    layers = sum(len(shape.experts) for shape in shapes)
    return Pool(
        hosts=tuple(PoolHost(name=f"host-{h}", slots=slots * layers) for h in range(hosts)),
        shapes=tuple(shapes),
        slots=slots,
        assignments_per_s=assignments_per_s,
        loading_bytes_per_s=loading_bytes_per_s,
    )


def host_speed(trace: Trace, hosts: int, utilisation: float) -> float:
    """Return the assignments per second that one host computes.

    As recorded in the trace; a trace without hosts gets a speed at which ``hosts`` hosts are busy
    for a fraction ``utilisation`` of the time.
    """
    busy_s = float(trace.busy_s_WH.sum())
    if busy_s > 0:
        return float(trace.assignments_WH.sum()) / busy_s
    assignments = sum(int(counts.sum()) for counts in trace.counts.values())
    return max(1.0, assignments) / (trace.windows * trace.window_s) / (hosts * utilisation)


def shifting_day(
    *,
    layers: int = 8,
    experts: int = 64,
    hosts: int = 8,
    slots: int = 10,
    window_s: float = 300.0,
    seed: int = 0,
    utilisation: float = 0.65,
    swing: float = 0.3,
    elastic: Elastic | None = None,
) -> tuple[list[float], list[StrategyResult]]:
    """Compare the strategies on a day of traffic that shifts between four domains of traffic.

    Returns (the hour at which each window begins, figures). EPLB runs once an hour, ours whenever a
    move pays, and the autoscaler within ``elastic``. In a pool of fixed size, ``hosts`` hosts are
    busy for a fraction ``utilisation`` of the day.
    """
    shape = ModelShape(
        model="m", experts=dict.fromkeys(range(layers), experts), expert_bytes=44_000_000
    )
    trace = daily_trace(
        [shape],
        sigma=1.0,
        domains=4,
        windows=int(86_400 / window_s),
        window_s=window_s,
        assignments_per_s=10_000.0,
        swing=swing,
        rng=np.random.default_rng(seed),
    )
    pool = pool_of(
        [shape],
        hosts=hosts,
        slots=slots,
        assignments_per_s=host_speed(trace, hosts, utilisation),
        loading_bytes_per_s=200e6,
    )
    policy = control_policy(pool, every_s=window_s, budget=0.05, redundancy=0)
    found = compare(
        trace,
        pool,
        every=max(1, round(3600 / window_s)),
        slo_s=0.1,
        policy=policy,
        elastic=elastic,
    )
    return [w * window_s / 3600 for w in range(trace.windows)], found


def _figures(
    way: PlacementStrategy, trace: Trace, *, skip: int, slo_s: float, cost_per_hour: float
) -> StrategyResult:
    even_W, worst_W, served_W = [], [], []
    for window in range(trace.windows):
        counts = {key: counts_WE[window] for key, counts_WE in trace.counts.items()}
        served = way.serve(counts, trace.window_s)
        even = [balancedness(load_H, served.capacity_H) for load_H in served.load_H.values()]
        even_W.append(float(np.mean(even)))
        worst_W.append(min(even))
        served_W.append(served)
    counted = served_W[skip:]
    host_hours = sum(served.host_s for served in counted) / 3600
    return StrategyResult(
        strategy=way.name,
        balancedness_mean=float(np.mean(even_W[skip:])),
        balancedness_worst=min(worst_W[skip:]),
        moved_slots=sum(served.moved_slots for served in counted),
        moved_bytes=sum(served.moved_bytes for served in counted),
        slo_violations=sum(served.delay_s > slo_s for served in counted),
        windows=len(counted),
        host_hours=host_hours,
        cost=host_hours * cost_per_hour,
        scale_events=sum(served.scalings for served in counted),
        balancedness_W=tuple(even_W),
        moved_W=tuple(served.moved_slots for served in served_W),
        hosts_W=tuple(served.host_s / trace.window_s for served in served_W),
    )
