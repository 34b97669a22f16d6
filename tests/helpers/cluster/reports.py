"""Reports with plain values, for tests that change a few of them."""

from __future__ import annotations

from typing import Any

from moesaic.cluster.reports.placing import ChangePhase, ChangeReport
from moesaic.cluster.reports.report import HostState
from moesaic.cluster.reports.scaling import ScalingPhase, ScalingReport, ScalingStatus
from moesaic.cluster.reports.status import (
    BalancingStatus,
    ClusterStatus,
    ControllerStatus,
    EngineStatus,
    EngineWork,
    HostProcess,
    HostStatus,
)

CHANGE = ChangeReport(
    id=7,
    initiator="balancer",
    reason="load",
    phase=ChangePhase.DONE,
    age_s=3.2,
    duration_s=1.5,
    total_moves=3,
    pending_moves=0,
    weight_bytes=2**20,
    balancedness_before=None,
    balancedness_predicted=None,
    errors=[],
    measured=None,
)
SCALING = ScalingReport(
    id=4,
    group=0,
    initiator="me",
    reason="asked for",
    hosts_before=2,
    target_hosts=3,
    arriving_hosts=["host-2"],
    leaving_hosts=[],
    awaited_hosts=["host-2"],
    phase=ScalingPhase.STARTING,
    age_s=3.2,
    duration_s=None,
    remaining_replicas=0,
    obstacles={},
)
PROCESS = HostProcess(
    incarnation=1,
    node="n",
    pid=123,
    device="cpu",
    replicas=8,
    loading_replicas=0,
    weight_bytes=2**20,
    rss_bytes=2**21,
    calls=5,
    rows=50,
    assignments=100,
    batches=4,
    refused_calls=0,
    queued_rows=0,
    busy_s=0.5,
    connected_routers=1,
    overrun_batches=0,
    worst_overrun_s=0.0,
    total_late_s=0.0,
)
_CLUSTER = ClusterStatus(
    placement=None,
    controller=ControllerStatus(term=3, ticks=9, tick_age_s=0.1, failing=False, error=None),
    warnings=[],
    balancing=BalancingStatus(
        automatic=True,
        plan_age_s=None,
        planning_s=0.0,
        failed_plans=0,
        arrival_age_s=None,
        pending_moves=0,
        draining_hosts=[],
        last_change=None,
    ),
    scaling=ScalingStatus(
        groups=[],
        busy_fraction=None,
        wait_ratio=None,
        leaving_hosts=[],
        pause_reason=None,
        problem=None,
        owner_age_s=1.0,
        recent=[],
    ),
    routers=[],
    router_service=None,
    hosts=[],
    models=[],
    balancedness=None,
    missing_experts=0,
    missing_examples=[],
    unprotected_experts=0,
)


def cluster_report(**changed: Any) -> ClusterStatus:
    return _CLUSTER.model_copy(update=changed)


def host_report(name: str, **changed: Any) -> HostStatus:
    host = HostStatus(
        name=name, state=HostState.UP, obstacle=None, error=None, process=PROCESS, ready=True
    )
    return host.model_copy(update=changed)


def engine_report(*, healthy: bool = True, **changed: Any) -> EngineStatus:
    """``changed``: figures of its work."""
    work = EngineWork(
        running_requests=0,
        waiting_requests=0,
        parked_requests=0,
        steps=0,
        restarts=0,
        beat_age_s=0.0,
        free_cache_fraction=1.0,
    )
    return EngineStatus(
        healthy=healthy,
        starts_on_demand=False,
        last_error=None,
        work=work.model_copy(update=changed),
    )
