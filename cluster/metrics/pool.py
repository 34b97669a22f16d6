"""The pool's metrics, from what the controller tells at a scrape."""

from __future__ import annotations

from collections import Counter

from ..reports.report import HostState
from ..reports.status import ClusterStatus, HostStatus, ModelStatus, RouterServiceState
from .families import Families
from .snapshot import MetricsSnapshot


def pool_families(snapshot: MetricsSnapshot | None) -> Families:
    """Return all that the controller answers for; None: it did not answer."""
    found = Families()
    found.add("controller_up", snapshot is not None)
    if snapshot is not None:
        _controller(found, snapshot.status)
        _planning(found, snapshot)
        _models(found, snapshot)
        _experts(found, snapshot)
        _hosts(found, snapshot)
        _machines(found, snapshot.status)
        _routers(found, snapshot)
        _router_service(found, snapshot.status)
        _training(found, snapshot.status)
    return found


def _controller(found: Families, status: ClusterStatus) -> None:
    controller = status.controller
    found.add("controller_term", controller.term)
    found.add("controller_ticks_total", controller.ticks)
    found.add("controller_tick_age_seconds", controller.tick_age_s)
    found.add("controller_failing", controller.failing)
    found.add("controller_warnings", len(status.warnings))
    if status.placement is not None:
        found.add("placement_epoch", status.placement.epoch)


def _planning(found: Families, snapshot: MetricsSnapshot) -> None:
    balancing, plans = snapshot.status.balancing, snapshot.plans
    found.add("plans_total", plans.ended)
    found.add("plan_failures_total", plans.failed)
    found.add("plan_consecutive_failures", balancing.failed_plans)
    found.add("planning_seconds_total", plans.took_s)
    found.add("plan_running_seconds", balancing.planning_s)
    found.add("balancer_automatic", balancing.automatic)
    found.add("changes_total", snapshot.last_change)
    found.add("moves_pending", balancing.pending_moves)
    found.add("move_arrival_age_seconds", balancing.arrival_age_s)


def _models(found: Families, snapshot: MetricsSnapshot) -> None:
    for model in snapshot.status.models:
        figures, name = snapshot.models[model.name], model.name
        found.add("model_experts", model.experts, model=name)
        found.add("model_asleep", model.asleep, model=name)
        found.add("model_assignments_total", figures.assignments, model=name)
        found.add("model_weight_version", figures.version, model=name)
        found.add("model_wanted_replicas", figures.wanted_replicas, model=name)
        found.add("missing_experts", model.missing_experts, model=name)
        found.add("unprotected_experts", figures.unprotected_experts, model=name)
        found.add("updated_experts", model.updated_experts, model=name)
        found.add("volatile_experts", model.volatile_experts, model=name)
        found.add("loaded_replicas_total", figures.loads.loaded, model=name)
        found.add("loaded_bytes_total", figures.loads.loaded_bytes, model=name)
        found.add("failed_loads_total", figures.loads.failed, model=name)
        _routing(found, model)
    for model in snapshot.activity.models:
        if model.balancedness is not None:
            found.add("balancedness_mean_ratio", model.balancedness.mean, model=model.name)
            found.add("balancedness_worst_ratio", model.balancedness.worst, model=model.name)


def _routing(found: Families, model: ModelStatus) -> None:
    collapsed = sum(one.collapsed for one in model.routing)
    found.add("collapsed_layers", collapsed, model=model.name)
    for one in model.routing:
        labels = {"model": model.name, "layer": one.layer}
        found.add("routing_entropy_ratio", one.entropy, **labels)
        found.add("routing_max_over_mean_ratio", one.max_over_mean, **labels)
        found.add("dead_experts", one.dead_experts, **labels)


def _experts(found: Families, snapshot: MetricsSnapshot) -> None:
    for one in snapshot.activity.hottest_experts:
        labels = {"model": one.model, "layer": one.layer, "expert": one.expert}
        found.add("expert_assignments_per_second", one.assignments_per_s, **labels)
        found.add("expert_replicas", len(one.hosts), **labels)


def _hosts(found: Families, snapshot: MetricsSnapshot) -> None:
    status = snapshot.status
    states = Counter(host.state.value for host in status.hosts)
    for state in sorted(states.keys() | {known.value for known in HostState}):
        found.add("hosts", states[state], state=state)
    for host in status.hosts:
        name = host.name
        found.add("host_state", 1, host=name, state=host.state.value)
        found.add("host_ready", host.ready, host=name)
        found.add("host_draining", name in status.balancing.draining_hosts, host=name)
        found.add("host_slots", host.slots, host=name)
        found.add("host_memory_limit_bytes", host.memory_limit_bytes, host=name)
        found.add("host_queue_seconds_total", snapshot.host_queued_s.get(name), host=name)
        found.add("host_lending_routers", snapshot.paths.lending.get(name, 0), host=name)
        if status.training is not None:
            owned = status.training.owned_tensors.get(name, 0)
            found.add("host_owned_tensors", owned, host=name)
            found.add("host_owned_bytes", status.training.owned_bytes.get(name), host=name)
        _host_process(found, host)


def _host_process(found: Families, host: HostStatus) -> None:
    process, name = host.process, host.name
    if process is None:
        return
    found.add("host_start_time_seconds", process.incarnation / 1e9, host=name)
    found.add("host_replicas", process.replicas, host=name)
    found.add("host_loading_replicas", process.loading_replicas, host=name)
    found.add("host_weights_bytes", process.weight_bytes, host=name)
    found.add("host_resident_memory_bytes", process.rss_bytes, host=name)
    found.add("host_gpu_memory_used_bytes", process.card_used_bytes, host=name)
    found.add("host_gpu_memory_limit_bytes", process.card_limit_bytes, host=name)
    found.add("host_calls_total", process.calls, host=name)
    found.add("host_rows_total", process.rows, host=name)
    found.add("host_assignments_total", process.assignments, host=name)
    found.add("host_batches_total", process.batches, host=name)
    found.add("host_refused_calls_total", process.refused_calls, host=name)
    found.add("host_received_bytes_total", process.received_bytes, host=name)
    found.add("host_sent_bytes_total", process.sent_bytes, host=name)
    found.add("host_busy_seconds_total", process.busy_s, host=name)
    found.add("host_queued_rows", process.queued_rows, host=name)
    found.add("host_connected_routers", process.connected_routers, host=name)


def _machines(found: Families, status: ClusterStatus) -> None:
    for node in status.nodes:
        found.add("node_memory_bytes", node.memory_bytes, node=node.node)
        found.add("node_free_memory_bytes", node.free_bytes, node=node.node)
    scaling = status.scaling
    for index, group in enumerate(scaling.groups):
        found.add("group_hosts", group.hosts, group=index)
        found.add("group_min_hosts", group.min_hosts, group=index)
        found.add("group_max_hosts", group.max_hosts, group=index)
    found.add("scaling_busy_ratio", scaling.busy_fraction)
    found.add("scaling_wait_ratio", scaling.wait_ratio)
    found.add("scaling_blocked", scaling.problem is not None)


def _routers(found: Families, snapshot: MetricsSnapshot) -> None:
    counts = snapshot.routers
    found.add("routers", snapshot.router_count)
    found.add("router_calls_total", counts.calls)
    found.add("router_rows_total", counts.rows)
    found.add("router_lent_assignments_total", counts.lent_assignments)
    found.add("router_retries_total", counts.retries)
    found.add("router_hedges_total", counts.hedges)
    found.add("router_hedge_wins_total", counts.hedge_wins)
    found.add("router_ejections_total", counts.ejections)
    found.add("router_lost_rows_total", counts.lost_rows)
    for transport, connections in sorted(snapshot.paths.connections.items()):
        found.add("transport_connections", connections, transport=transport)
    for transport, sends in sorted(counts.transports.items()):
        found.add("transport_sends_total", sends.sends, transport=transport)
        found.add("transport_failures_total", sends.failures, transport=transport)
        found.add("transport_sent_bytes_total", sends.sent_bytes, transport=transport)
        found.add("transport_received_bytes_total", sends.received_bytes, transport=transport)
        found.add_histogram(
            "transport_answer_seconds", sends.buckets, sends.answer_s, transport=transport
        )


def _router_service(found: Families, status: ClusterStatus) -> None:
    service = status.router_service
    if service is None:
        return
    found.add("router_service_up", service.state is RouterServiceState.UP)
    process = service.process
    if process is not None:
        found.add("router_service_calls_total", process.calls)
        found.add("router_service_rows_total", process.rows)
        found.add("router_service_batches_total", process.batches)
        found.add("router_service_refused_calls_total", process.refused_calls)
        found.add("router_service_expired_calls_total", process.expired_calls)
        found.add("router_service_held_calls", process.held_calls)
        found.add("router_service_held_bytes", process.held_bytes)


def _training(found: Families, status: ClusterStatus) -> None:
    training = status.training
    if training is not None:
        found.add("training_run", training.run, model=training.model)
        found.add("training_age_seconds", training.age_s, model=training.model)
        found.add("training_steps_total", training.steps, model=training.model)
        found.add("training_attempt", training.attempt, model=training.model)
        found.add("training_workers", training.workers, model=training.model)
        unprotected = training.unprotected_tensors
        found.add("training_unprotected_tensors", unprotected, model=training.model)
        if training.step_s is not None:
            found.add("training_step_seconds", training.step_s, model=training.model)
        if training.tokens_per_s is not None:
            rate = training.tokens_per_s
            found.add("training_tokens_per_second", rate, model=training.model)
