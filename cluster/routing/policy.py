"""Time limits of a router, and limits on its sends, retries and hedges."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterPolicy:
    """Deadlines and limits of a router; times in seconds."""

    deadline_s: float = 60.0  # of one layer's call, including the wait for a host to restart
    attempt_s: float = 2.0  # of one send; doubles each time that sends of its call miss it
    window: int = 8  # calls on one connection, including those given up but not yet freed
    split_rows: int = 16  # an expert with fewer tokens is not split over its replicas
    probe_s: float = 0.05  # first interval between probes of an ejected host; doubles
    probe_max_s: float = 2.0
    connect_s: float = 2.0  # from Connect to Welcome
    orphan_s: float = 30.0  # how long the lent memory of a host that is gone is kept
    # Whether a call of which all experts are lent may be sent in part, where that is faster.
    splits_lent: bool = False
    reconnect_s: float = 0.2  # between attempts to connect
    busy_s: float = 0.005  # before a host that refused as Busy gets calls again; doubles
    busy_max_s: float = 0.5
    # A send is repeated on another replica once it is older than this quantile of the answer times
    # of its size, and than hedge_min_s.
    hedge_quantile: float = 0.99
    hedge_min_s: float = 0.005
    hedge_share: float = 0.05  # largest fraction of all sends that may be hedged
    hedge_burst: float = 8.0  # hedges that can be saved up
    # A host whose send was overtaken by a hedge is avoided for avoid_s. If that happens again, the
    # time doubles, and is at least avoid_ages times as long as the overtaken send waited.
    avoid_s: float = 0.1
    avoid_ages: float = 4.0
    avoid_max_s: float = 5.0
    # Fraction of all sends that may be retries; those after NotHere and HostLost are not counted.
    retry_share: float = 0.2
    retry_per_s: float = 10.0  # retries per second in addition to that fraction
    retry_burst: float = 20.0  # retries that can be saved up
