"""The panels of the dashboards for Grafana, which `dashboards.py` lays out and writes.

Each expression names the variables `$cluster` and `$model`, which stand above the panels, and
`$__rate_interval`.
"""

from __future__ import annotations

from dataclasses import dataclass

CLUSTER = 'cluster="$cluster"'
_M = 'cluster="$cluster", model=~"$model"'
_R = "[$__rate_interval]"


@dataclass(frozen=True)
class Panel:
    """A panel; ``queries`` are expressions, each with its legend."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    width: int = 12
    kind: str = "timeseries"
    # Of a `stat`: red where the value is above (or below) this; None: it has no color.
    bad_above: float | None = None
    bad_below: float | None = None
    stacked: bool = False


def _lines(title: str, unit: str, *queries: tuple[str, str], stacked: bool = False) -> Panel:
    return Panel(title, unit, queries, stacked=stacked)


def _line(title: str, unit: str, expr: str, legend: str) -> Panel:
    return _lines(title, unit, (expr, legend))


def _stat(
    title: str,
    expr: str,
    unit: str = "short",
    *,
    bad_above: float | None = None,
    bad_below: float | None = None,
) -> Panel:
    return Panel(title, unit, ((expr, ""),), 4, "stat", bad_above, bad_below)


def _quantiles(title: str, histogram: str, by: str, where: str) -> Panel:
    def of(quantile: float) -> str:
        rates = f"rate({histogram}_bucket{{{where}}}{_R})"
        return f"histogram_quantile({quantile}, sum by ({by}, le) ({rates}))"

    return _lines(title, "s", *((of(q), f"{{{{{by}}}}} p{q * 100:g}") for q in (0.5, 0.95, 0.99)))


def _rate(metric: str, where: str = CLUSTER) -> str:
    return f"rate({metric}{{{where}}}{_R})"


# Sections, each with its panels.
Sections = list[tuple[str, list[Panel]]]

_OVERVIEW: Sections = [
    (
        "Now",
        [
            _stat("Controller", f"moesaic_controller_up{{{CLUSTER}}}", bad_below=1),
            _stat("Hosts up", f'moesaic_hosts{{{CLUSTER}, state="up"}}', bad_below=1),
            _stat(
                "Hosts away",
                f'sum(moesaic_hosts{{{CLUSTER}, state=~"not_answering|restarting|gone"}})',
                bad_above=1,
            ),
            _stat("Missing experts", f"sum(moesaic_missing_experts{{{CLUSTER}}})", bad_above=1),
            _stat("Pending moves", f"moesaic_moves_pending{{{CLUSTER}}}"),
            _stat("Requests running", f"sum(moesaic_requests_running{{{CLUSTER}}})"),
        ],
    ),
    (
        "Clients",
        [
            _lines(
                "Answers by status",
                "reqps",
                (f"sum by (status) ({_rate('moesaic_http_responses_total')})", "{{status}}"),
                stacked=True,
            ),
            _lines(
                "Tokens generated",
                "short",
                (f"sum by (model) ({_rate('moesaic_generated_tokens_total', _M)})", "{{model}}"),
            ),
            _quantiles("Time to first token", "moesaic_time_to_first_token_seconds", "model", _M),
            _quantiles("Time between tokens", "moesaic_inter_token_latency_seconds", "model", _M),
        ],
    ),
    (
        "Pool",
        [
            _lines(
                "Hosts by state",
                "short",
                (f"moesaic_hosts{{{CLUSTER}}}", "{{state}}"),
                stacked=True,
            ),
            _line(
                "Busy share of hosts",
                "percentunit",
                _rate("moesaic_host_busy_seconds_total"),
                "{{host}}",
            ),
            _lines(
                "Lent share of assignments",
                "percentunit",
                (
                    f"{_rate('moesaic_router_lent_assignments_total')} / on (cluster) sum "
                    f"by (cluster) ({_rate('moesaic_model_assignments_total')})",
                    "lent",
                ),
            ),
            _lines(
                "Balancedness",
                "percentunit",
                (f"moesaic_balancedness_mean_ratio{{{_M}}}", "{{model}} mean"),
                (f"moesaic_balancedness_worst_ratio{{{_M}}}", "{{model}} worst layer"),
            ),
            _lines(
                "Memory of hosts",
                "bytes",
                (f"moesaic_host_resident_memory_bytes{{{CLUSTER}}}", "{{host}} process"),
                (f"moesaic_host_weights_bytes{{{CLUSTER}}}", "{{host}} weights"),
            ),
            _line(
                "Memory of machines in use",
                "percentunit",
                f"1 - moesaic_node_free_memory_bytes{{{CLUSTER}}} / "
                f"moesaic_node_memory_bytes{{{CLUSTER}}}",
                "{{node}}",
            ),
        ],
    ),
    (
        "Controller",
        [
            _line(
                "Age of the last tick",
                "s",
                f"moesaic_controller_tick_age_seconds{{{CLUSTER}}}",
                "age",
            ),
            _lines(
                "Warnings and failures",
                "short",
                (f"moesaic_controller_warnings{{{CLUSTER}}}", "warnings"),
                (f"moesaic_controller_failing{{{CLUSTER}}}", "failing"),
                (f"moesaic_plan_consecutive_failures{{{CLUSTER}}}", "plans failed in a row"),
            ),
        ],
    ),
]
_EXPERTS: Sections = [
    (
        "Load",
        [
            _line(
                "Assignments", "short", _rate("moesaic_model_assignments_total", _M), "{{model}}"
            ),
            _line(
                "Hottest experts: assignments per second",
                "short",
                f"moesaic_expert_assignments_per_second{{{_M}}}",
                "{{model}} {{layer}}/{{expert}}",
            ),
            _line(
                "Hottest experts: replicas",
                "short",
                f"moesaic_expert_replicas{{{_M}}}",
                "{{model}} {{layer}}/{{expert}}",
            ),
            _lines(
                "Balancedness",
                "percentunit",
                (f"moesaic_balancedness_mean_ratio{{{_M}}}", "{{model}} mean"),
                (f"moesaic_balancedness_worst_ratio{{{_M}}}", "{{model}} worst layer"),
            ),
        ],
    ),
    (
        "Where they are",
        [
            _lines(
                "Replicas by host",
                "short",
                (f"moesaic_host_replicas{{{CLUSTER}}}", "{{host}}"),
                stacked=True,
            ),
            _lines(
                "Missing and unprotected experts",
                "short",
                (f"moesaic_missing_experts{{{_M}}}", "{{model}} missing"),
                (f"moesaic_unprotected_experts{{{_M}}}", "{{model}} unprotected"),
            ),
            _lines(
                "Moves",
                "short",
                (f"moesaic_moves_pending{{{CLUSTER}}}", "pending"),
                (f"sum(moesaic_host_loading_replicas{{{CLUSTER}}})", "loading"),
            ),
            _line("Bytes loaded", "Bps", _rate("moesaic_loaded_bytes_total", _M), "{{model}}"),
            _lines(
                "Replicas loaded",
                "short",
                (_rate("moesaic_loaded_replicas_total", _M), "{{model}} loaded"),
                (_rate("moesaic_failed_loads_total", _M), "{{model}} failed"),
            ),
            _line(
                "Weights: version that is served",
                "short",
                f"moesaic_model_weight_version{{{_M}}}",
                "{{model}}",
            ),
            _lines(
                "Weights: experts that were updated",
                "short",
                (f"moesaic_updated_experts{{{_M}}}", "{{model}} updated"),
                (f"moesaic_volatile_experts{{{_M}}}", "{{model}} in no file"),
            ),
            _line("Models asleep", "short", f"moesaic_model_asleep{{{_M}}}", "{{model}}"),
        ],
    ),
    (
        "Planner",
        [
            _lines(
                "Plans",
                "short",
                (_rate("moesaic_plans_total"), "plans"),
                (_rate("moesaic_plan_failures_total"), "failed"),
            ),
            _lines(
                "Seconds for a plan",
                "s",
                (
                    f"{_rate('moesaic_planning_seconds_total')} / "
                    f"({_rate('moesaic_plans_total')} > 0)",
                    "mean",
                ),
                (f"moesaic_plan_running_seconds{{{CLUSTER}}}", "running"),
            ),
            _line(
                "Changes of the placement",
                "short",
                f"increase(moesaic_changes_total{{{CLUSTER}}}{_R})",
                "changes",
            ),
            _lines(
                "Hosts by group",
                "short",
                (f"moesaic_group_hosts{{{CLUSTER}}}", "group {{group}}"),
                (f"moesaic_group_max_hosts{{{CLUSTER}}}", "group {{group}} at most"),
            ),
        ],
    ),
]
_SERVING: Sections = [
    (
        "Requests",
        [
            _lines(
                "Choices by how they ended",
                "short",
                (f"sum by (reason) ({_rate('moesaic_choices_total', _M)})", "{{reason}}"),
                stacked=True,
            ),
            _quantiles(
                "Time to the end of a request", "moesaic_request_latency_seconds", "model", _M
            ),
            _lines(
                "Tokens",
                "short",
                (_rate("moesaic_prompt_tokens_total", _M), "{{model}} prompts"),
                (_rate("moesaic_generated_tokens_total", _M), "{{model}} answers"),
            ),
            _line(
                "Requests being answered", "short", f"moesaic_requests_running{{{_M}}}", "{{model}}"
            ),
        ],
    ),
    (
        "Engines",
        [
            _lines(
                "Requests of engines",
                "short",
                (f"moesaic_engine_running_requests{{{_M}}}", "{{model}} running"),
                (f"moesaic_engine_waiting_requests{{{_M}}}", "{{model}} waiting"),
                (f"moesaic_engine_parked_requests{{{_M}}}", "{{model}} parked"),
            ),
            _line(
                "KV cache in use",
                "percentunit",
                f"1 - moesaic_engine_free_cache_ratio{{{_M}}}",
                "{{model}}",
            ),
            _lines(
                "Steps",
                "short",
                (_rate("moesaic_engine_steps_total", _M), "{{model}}"),
                (_rate("moesaic_engine_restarts_total", _M), "{{model}} restarts"),
            ),
            _line("Healthy", "short", f"moesaic_engine_healthy{{{_M}}}", "{{model}}"),
        ],
    ),
    (
        "Routers",
        [
            _quantiles(
                "Time from a send to its answer",
                "moesaic_transport_answer_seconds",
                "transport",
                CLUSTER,
            ),
            _lines(
                "Sends",
                "short",
                (_rate("moesaic_transport_sends_total"), "{{transport}}"),
                (_rate("moesaic_transport_failures_total"), "{{transport}} failed"),
            ),
            _lines(
                "Bytes",
                "Bps",
                (_rate("moesaic_transport_sent_bytes_total"), "{{transport}} sent"),
                (_rate("moesaic_transport_received_bytes_total"), "{{transport}} received"),
            ),
            _lines(
                "Retries, hedges, losses",
                "short",
                (_rate("moesaic_router_retries_total"), "retries"),
                (_rate("moesaic_router_hedges_total"), "hedges"),
                (_rate("moesaic_router_hedge_wins_total"), "hedges that won"),
                (_rate("moesaic_router_ejections_total"), "ejections"),
                (_rate("moesaic_router_lost_rows_total"), "lost rows"),
            ),
            _lines(
                "Calls of layers",
                "short",
                (_rate("moesaic_router_calls_total"), "calls"),
                (_rate("moesaic_router_rows_total"), "rows"),
            ),
            _lines(
                "Routers and connections",
                "short",
                (f"moesaic_routers{{{CLUSTER}}}", "routers"),
                (f"moesaic_transport_connections{{{CLUSTER}}}", "{{transport}} connections"),
            ),
        ],
    ),
    (
        "Hosts",
        [
            _lines("Rows", "short", (_rate("moesaic_host_rows_total"), "{{host}}"), stacked=True),
            _lines(
                "Mean wait in the queue",
                "s",
                (
                    f"{_rate('moesaic_host_queue_seconds_total')} / "
                    f"({_rate('moesaic_host_calls_total')} > 0)",
                    "{{host}}",
                ),
            ),
            _line("Rows that wait", "short", f"moesaic_host_queued_rows{{{CLUSTER}}}", "{{host}}"),
            _lines(
                "Calls in a batch",
                "short",
                (
                    f"{_rate('moesaic_host_calls_total')} / "
                    f"({_rate('moesaic_host_batches_total')} > 0)",
                    "{{host}}",
                ),
            ),
            _line("Calls refused", "short", _rate("moesaic_host_refused_calls_total"), "{{host}}"),
            _line(
                "Routers that compute with the host's memory",
                "short",
                f"moesaic_host_lending_routers{{{CLUSTER}}}",
                "{{host}}",
            ),
        ],
    ),
]
_TRAINING: Sections = [
    (
        "Run",
        [
            _stat("Run", f"max(moesaic_training_run{{{_M}}})"),
            _stat("Steps", f"max(moesaic_training_steps_total{{{_M}}})"),
            _stat("Attempt", f"max(moesaic_training_attempt{{{_M}}})"),
            _stat("Processes", f"max(moesaic_training_workers{{{_M}}})"),
            _stat("Unprotected", f"max(moesaic_training_unprotected_tensors{{{_M}}})"),
            _stat("Age", f"max(moesaic_training_age_seconds{{{_M}}})", "s"),
            _stat("Version served", f"max(moesaic_model_weight_version{{{_M}}})"),
            _stat("Experts in no file", f"sum(moesaic_volatile_experts{{{_M}}})"),
            _stat("Hosts up", f'moesaic_hosts{{{CLUSTER}, state="up"}}', bad_below=1),
        ],
    ),
    (
        "Steps",
        [
            _line(
                "Steps per minute",
                "short",
                f"60 * {_rate('moesaic_training_steps_total', _M)}",
                "{{model}}",
            ),
            _lines(
                "Seconds per step",
                "s",
                (f"moesaic_training_step_seconds{{{_M}}}", "{{model}}"),
            ),
            _lines(
                "Tokens per second",
                "short",
                (f"moesaic_training_tokens_per_second{{{_M}}}", "{{model}}"),
            ),
            _line(
                "Rows that routers computed", "short", _rate("moesaic_router_rows_total"), "rows"
            ),
            _line(
                "Assignments", "short", _rate("moesaic_model_assignments_total", _M), "{{model}}"
            ),
        ],
    ),
    (
        "Routing",
        [
            _line(
                "Entropy of the worst layers",
                "percentunit",
                f"bottomk(5, moesaic_routing_entropy_ratio{{{_M}}})",
                "{{model}} {{layer}}",
            ),
            _line(
                "Maximum over mean of the worst layers",
                "short",
                f"topk(5, moesaic_routing_max_over_mean_ratio{{{_M}}})",
                "{{model}} {{layer}}",
            ),
            _line(
                "Dead experts",
                "short",
                f"sum by (model) (moesaic_dead_experts{{{_M}}})",
                "{{model}}",
            ),
            _line("Collapsed layers", "short", f"moesaic_collapsed_layers{{{_M}}}", "{{model}}"),
        ],
    ),
    (
        "Hosts",
        [
            _lines(
                "Memory of what hosts own",
                "bytes",
                (f"moesaic_host_owned_bytes{{{CLUSTER}}}", "{{host}}"),
                stacked=True,
            ),
            _lines(
                "Tensors that hosts own",
                "short",
                (f"moesaic_host_owned_tensors{{{CLUSTER}}}", "{{host}}"),
                stacked=True,
            ),
            _line(
                "Busy share of hosts",
                "percentunit",
                _rate("moesaic_host_busy_seconds_total"),
                "{{host}}",
            ),
            _line(
                "Memory of hosts' processes",
                "bytes",
                f"moesaic_host_resident_memory_bytes{{{CLUSTER}}}",
                "{{host}}",
            ),
            _line(
                "Weights on hosts", "bytes", f"moesaic_host_weights_bytes{{{CLUSTER}}}", "{{host}}"
            ),
        ],
    ),
]
DASHBOARDS: dict[str, tuple[str, Sections]] = {
    "overview": ("Moesaic / Overview", _OVERVIEW),
    "experts": ("Moesaic / Experts", _EXPERTS),
    "serving": ("Moesaic / Serving", _SERVING),
    "training": ("Moesaic / Training", _TRAINING),
}
