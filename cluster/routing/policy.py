"""How patient a router is with its hosts, and what it may hold in flight."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterPolicy:
    """Deadlines and limits of a router; times in seconds."""

    deadline_s: float = 60.0  # one layer's call, waiting for a restart included
    attempt_s: float = 2.0  # first try of one send; doubles with every miss of the same call
    window: int = 8  # calls on one connection, quarantined ones included
    split_rows: int = 16  # an expert with fewer tokens is not split over its replicas
    probe_s: float = 0.05  # first interval between probes of an ejected host; doubles
    probe_max_s: float = 2.0
    connect_s: float = 2.0  # from Connect to Welcome
    reconnect_s: float = 0.2  # between attempts to connect
    busy_s: float = 0.005  # before a host that was busy is asked again; doubles
    busy_max_s: float = 0.5
    hedge_quantile: float = 0.99  # a send later than so many of its size goes to another replica,
    hedge_least_s: float = 0.005  # but not before it is so old,
    hedge_share: float = 0.05  # and not for more than this part of all sends
    hedge_burst: float = 8.0  # hedges that can be saved up
    avoid_s: float = 0.1  # for how long a host that was overtaken once is avoided; if it is again,
    avoid_ages: float = (
        4.0  # at least so many times as long as the call waited, and twice as before
    )
    avoid_max_s: float = 5.0
    retry_share: float = 0.2  # part of all sends that may be retries; failing over is free
    retry_per_s: float = 10.0
    retry_burst: float = 20.0
