"""Snapshots of metrics with plain values, and their samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from moesaic.cluster.control.watchdog import PlanCounts
from moesaic.cluster.load.router_counts import RouterCounts, TransportCounts
from moesaic.cluster.metrics.families import exposition
from moesaic.cluster.metrics.pool import pool_families
from moesaic.cluster.metrics.snapshot import LoadCounts, MetricsSnapshot, ModelFigures, PathCounts
from moesaic.cluster.reports.activity import Activity, HotExpert, ModelActivity
from moesaic.cluster.reports.report import Balancedness, LayerRouting, PlacementNumber
from moesaic.cluster.reports.scaling import HostGroupStatus
from moesaic.cluster.reports.status import (
    HostStatus,
    ModelStatus,
    NodeStatus,
    RouterServiceProcess,
    RouterServiceState,
    RouterServiceStatus,
    TrainingStatus,
)
from tests.helpers.cluster.reports import PROCESS, cluster_report, host_report

# (name, labels) -> value.
Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]

CARD = PROCESS.model_copy(
    update={"card_used_bytes": 2**30, "card_limit_bytes": 2**31, "received_bytes": 7}
)
_MODEL = ModelStatus(
    name="m",
    path=None,
    dtype="float32",
    min_replicas=1,
    exact=False,
    layers=2,
    experts=8,
    asleep=False,
    missing_experts=1,
    updated_experts=2,
    volatile_experts=1,
    routing=[
        LayerRouting(
            layer=layer,
            experts=4,
            entropy=entropy,
            max_over_mean=2.0,
            dead_experts=dead,
            busiest_expert=1,
            collapsed=dead > 0,
        )
        for layer, entropy, dead in ((0, 0.9, 0), (1, 0.5, 2))
    ],
)


def activity(hottest: Sequence[tuple[int, int]] = ((0, 3), (1, 2))) -> Activity:
    """``hottest``: their layers and numbers."""
    return Activity(
        placement=None,
        router_count=1,
        pending_moves=0,
        missing_experts=0,
        unprotected_experts=0,
        warnings=[],
        error=None,
        models=[
            ModelActivity(
                name="m", assignments_per_s=1.0, balancedness=Balancedness(mean=0.9, worst=0.5)
            )
        ],
        hosts=[],
        hottest_experts=[
            HotExpert(model="m", layer=layer, expert=expert, assignments_per_s=5.0, hosts=["a"])
            for layer, expert in hottest
        ],
    )


def snapshot(hosts: Sequence[HostStatus] | None = None, **changed: Any) -> MetricsSnapshot:
    """A pool that has something of everything."""
    status = cluster_report(
        placement=PlacementNumber(term=3, epoch=8),
        hosts=hosts
        or [host_report("a", slots=8, process=CARD), host_report("b", memory_limit_bytes=2**30)],
        models=[_MODEL],
        nodes=[
            NodeStatus(
                node="n",
                hosts=["a", "b"],
                weight_bytes=1,
                rss_bytes=2,
                memory_bytes=2**34,
                free_bytes=2**33,
            )
        ],
        router_service=RouterServiceStatus(
            address="127.0.0.1:1",
            state=RouterServiceState.UP,
            error=None,
            process=RouterServiceProcess(
                pid=1,
                calls=4,
                rows=5,
                batches=6,
                merged_batches=0,
                refused_calls=0,
                expired_calls=0,
                expert_waits=0,
                held_calls=0,
                held_bytes=0,
            ),
        ),
        training=TrainingStatus(
            run=2,
            model="m",
            initiator="me",
            age_s=9.0,
            version=5,
            steps=4,
            attempt=1,
            workers=2,
            unprotected_tensors=6,
            owned_tensors={"a": 3},
            owned_bytes={"a": 4096},
            step_s=2.5,
            tokens_per_s=1000.0,
        ),
    )
    scaling = status.scaling.model_copy(
        update={
            "groups": [HostGroupStatus(hosts=2, min_hosts=1, max_hosts=4, cost_per_hour=1.0)],
            "busy_fraction": 0.5,
            "wait_ratio": 0.1,
        }
    )
    balancing = status.balancing.model_copy(update={"arrival_age_s": 1.0})
    transports = {"shm": TransportCounts(sends=3, buckets=[0, 1, 2] + [0] * 11, answer_s=0.004)}
    values: dict[str, Any] = {
        "status": status.model_copy(update={"scaling": scaling, "balancing": balancing}),
        "activity": activity(),
        "routers": RouterCounts(calls=3, rows=30, transports=transports),
        "router_count": 1,
        "paths": PathCounts(connections={"shm": 2}, lending={"a": 1}),
        "host_queued_s": {"a": 0.25, "b": 0.5},
        "models": {
            "m": ModelFigures(
                assignments=40,
                version=5,
                wanted_replicas=2,
                unprotected_experts=3,
                loads=LoadCounts(loaded=8, loaded_bytes=800),
            )
        },
        "plans": PlanCounts(ended=2, failed=1, took_s=0.5),
        "last_change": 1,
    }
    return MetricsSnapshot(**(values | changed))


def samples(text: str) -> Samples:
    """What a scrape has brought."""
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, "a series stands there twice"
            found[key] = sample.value
    return found


def pool_samples(found: MetricsSnapshot | None) -> Samples:
    return samples(exposition(pool_families(found), "c").decode())


def value(found: Samples, name: str, **labels: str) -> float:
    return found[name, frozenset(({"cluster": "c"} | labels).items())]


def families_of(metrics: Sequence[Metric]) -> set[str]:
    """Their names as in the table."""
    return {f"{one.name}_total" if one.type == "counter" else one.name for one in metrics}
