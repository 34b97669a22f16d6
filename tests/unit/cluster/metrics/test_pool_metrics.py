"""Samples from snapshots: their values, and that they go with what they are about."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moesaic.cluster.load.meter import HostPath
from moesaic.cluster.load.router_counts import LATENCY_BOUNDS_S, RouterCounts, TransportCounts
from moesaic.cluster.metrics.engines import engine_families
from moesaic.cluster.metrics.families import exposition
from moesaic.cluster.metrics.snapshot import LoadCounts, PathCounts
from moesaic.cluster.reports.report import HostState
from tests.helpers.cluster.metrics import Samples, activity, pool_samples, samples, snapshot, value
from tests.helpers.cluster.reports import engine_report, host_report

# What nobody may be able to make series with: names of models are the spec's, though.
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


def names(found: Samples) -> set[str]:
    return {name for name, _ in found}


def test_values_are_those_of_the_snapshot() -> None:
    found = pool_samples(snapshot())
    assert value(found, "moesaic_controller_up") == 1
    assert value(found, "moesaic_controller_term") == 3
    assert value(found, "moesaic_placement_epoch") == 8
    assert value(found, "moesaic_plans_total") == 2
    assert value(found, "moesaic_planning_seconds_total") == 0.5
    assert value(found, "moesaic_loaded_bytes_total", model="m") == 800
    assert value(found, "moesaic_balancedness_worst_ratio", model="m") == 0.5
    assert value(found, "moesaic_routing_entropy_ratio", model="m", layer="0") == 0.9
    assert value(found, "moesaic_routing_max_over_mean_ratio", model="m", layer="1") == 2
    assert value(found, "moesaic_dead_experts", model="m", layer="1") == 2
    assert value(found, "moesaic_collapsed_layers", model="m") == 1
    assert value(found, "moesaic_host_slots", host="a") == 8
    assert ("moesaic_host_slots", frozenset({("cluster", "c"), ("host", "b")})) not in found
    assert value(found, "moesaic_host_memory_limit_bytes", host="b") == 2**30
    assert value(found, "moesaic_host_start_time_seconds", host="a") == 1e-9
    assert value(found, "moesaic_host_received_bytes_total", host="a") == 7
    assert value(found, "moesaic_host_lending_routers", host="a") == 1
    assert value(found, "moesaic_host_lending_routers", host="b") == 0
    assert value(found, "moesaic_hosts", state="up") == 2
    assert value(found, "moesaic_hosts", state="gone") == 0
    assert value(found, "moesaic_group_max_hosts", group="0") == 4
    assert value(found, "moesaic_training_steps_total", model="m") == 4
    assert value(found, "moesaic_host_owned_tensors", host="b") == 0
    assert value(found, "moesaic_expert_replicas", model="m", layer="0", expert="3") == 1


def test_a_histogram_counts_all_that_was_not_slower() -> None:
    found = pool_samples(snapshot())
    for bound, count in (("0.0005", 0), ("0.001", 1), ("0.002", 3), ("5.0", 3), ("+Inf", 3)):
        name = "moesaic_transport_answer_seconds_bucket"
        assert value(found, name, transport="shm", le=bound) == count
    assert value(found, "moesaic_transport_answer_seconds_sum", transport="shm") == 0.004
    assert value(found, "moesaic_transport_answer_seconds_count", transport="shm") == 3


def test_without_a_controller_there_is_nothing_old() -> None:
    assert pool_samples(None) == {
        ("moesaic_controller_up", frozenset({("cluster", "c")})): 0.0,
    }


def test_a_host_that_is_down_has_no_process_and_one_that_is_gone_has_nothing() -> None:
    down = host_report("b", process=None, state=HostState.RESTARTING)
    found = pool_samples(snapshot([host_report("a"), down]))
    of_b = {name for name, labels in found if ("host", "b") in labels}
    assert "moesaic_host_calls_total" not in of_b
    assert value(found, "moesaic_host_state", host="b", state="restarting") == 1
    gone = pool_samples(snapshot([host_report("a")]))
    assert not {name for name, labels in gone if ("host", "b") in labels}


def test_a_host_is_ready_or_not_or_does_not_say() -> None:
    hosts = [host_report("a"), host_report("b", ready=False), host_report("c", ready=None)]
    found = pool_samples(snapshot(hosts))
    assert value(found, "moesaic_host_ready", host="a") == 1
    assert value(found, "moesaic_host_ready", host="b") == 0
    assert ("moesaic_host_ready", frozenset({("cluster", "c"), ("host", "c")})) not in found


def test_a_host_of_a_state_of_a_newer_controller_is_counted() -> None:
    found = pool_samples(snapshot([host_report("a", state=HostState("resting"))]))
    assert value(found, "moesaic_hosts", state="resting") == 1


def test_an_expert_that_is_cold_takes_its_series_with_it() -> None:
    hot = pool_samples(snapshot(activity=activity([(0, 3)])))
    cold = pool_samples(snapshot(activity=activity([(5, 1)])))
    name = "moesaic_expert_assignments_per_second"
    assert [dict(labels)["expert"] for found, labels in hot if found == name] == ["3"]
    assert [dict(labels)["expert"] for found, labels in cold if found == name] == ["1"]


def test_an_engine_that_does_not_answer_has_no_figures() -> None:
    silent = engine_report(healthy=False).model_copy(update={"work": None})
    text = exposition(engine_families({"m": silent}), "").decode()
    assert samples(text) == {("moesaic_engine_healthy", frozenset({("model", "m")})): 0.0}


@given(name=NAMES, cluster=NAMES)
def test_any_name_of_a_host_is_one_label(name: str, cluster: str) -> None:
    text = exposition(engine_families({name: engine_report(steps=3)}), cluster).decode()
    key = "moesaic_engine_steps_total", frozenset({("cluster", cluster), ("model", name)})
    assert samples(text)[key] == 3


@given(st.lists(st.floats(0, 100), max_size=50))
def test_the_counts_of_reports_add_up(took_s: list[float]) -> None:
    total = RouterCounts()
    for one in took_s:
        place = sum(bound < one for bound in LATENCY_BOUNDS_S)
        buckets = [int(place == n) for n in range(len(LATENCY_BOUNDS_S) + 1)]
        counts = TransportCounts(sends=1, answer_s=one, buckets=buckets)
        total.add(RouterCounts(calls=1, transports={"shm": counts}))
    found = pool_samples(snapshot(routers=total))
    assert value(found, "moesaic_router_calls_total") == len(took_s)
    if took_s:
        name = "moesaic_transport_answer_seconds"
        assert value(found, f"{name}_count", transport="shm") == len(took_s)
        below = value(found, f"{name}_bucket", transport="shm", le="0.1")
        assert below == sum(one <= 0.1 for one in took_s)


def test_paths_are_counted_by_transport_and_by_host() -> None:
    paths = [
        HostPath(host="a", transport="shm", lent=True),
        HostPath(host="a", transport="shm", lent=False, why_sent="x"),
        HostPath(host="b", transport=None, lent=True),
    ]
    assert PathCounts.of(paths) == PathCounts(connections={"shm": 2}, lending={"a": 1, "b": 1})


def test_loads_are_counted_with_their_bytes() -> None:
    loads = LoadCounts()
    loads.count(5, failed=False)
    loads.count(5, failed=True)
    assert loads == LoadCounts(loaded=1, loaded_bytes=5, failed=1)
