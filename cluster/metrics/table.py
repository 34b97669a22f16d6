"""Every metric of `/metrics`: names, labels, units, meanings. docs/metrics.md is made from this.

Each series also has the label `cluster`. Other labels have few values: models and
their layers, hosts, transports and states that there are, and the hottest experts. No label has a
request, a router or a client.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric; a name that ends with ``_total`` is a counter's."""

    name: str
    labels: tuple[str, ...]  # besides ``cluster``
    unit: str
    is_histogram: bool
    meaning: str

    @property
    def kind(self) -> str:
        """Prometheus' word for its type."""
        if self.is_histogram:
            return "histogram"
        return "counter" if self.name.endswith("_total") else "gauge"


# A line with name, labels and unit, and below it the meaning.
_TABLE = """
moesaic_controller_up | - | 0 or 1
    1 if the controller answered this scrape; if it did not, all series that it answers for
    are absent
moesaic_controller_term | - | number
    the controller's term: a restarted controller has a higher one
moesaic_controller_ticks_total | - | ticks
    ticks of the controller's loop
moesaic_controller_tick_age_seconds | - | seconds
    time since the last tick
moesaic_controller_failing | - | 0 or 1
    1 if the last tick or the last plan ended with an error
moesaic_controller_warnings | - | warnings
    things that make no progress, as `moesaic status` names them
moesaic_placement_epoch | - | number
    the epoch of the placement in use; with the controller's term it is the placement's number
moesaic_plans_total | - | plans
    plans that the planner was asked for and that have ended, with a result or without one
moesaic_plan_failures_total | - | plans
    plans that ended with an error
moesaic_plan_consecutive_failures | - | plans
    plans that failed in a row until now
moesaic_planning_seconds_total | - | seconds
    time that the planner took for all plans
moesaic_plan_running_seconds | - | seconds
    how long the planner has been at work on the current plan; 0 if there is none
moesaic_balancer_automatic | - | 0 or 1
    1 if the balancer moves replicas by itself
moesaic_balancedness_mean_ratio | model | 0 to 1
    balancedness of the model's layers, as a mean over those with load; 1 is even; absent
    without load
moesaic_balancedness_worst_ratio | model | 0 to 1
    balancedness of the model's worst layer; absent without load
moesaic_changes_total | - | changes
    changes of the placement
moesaic_moves_pending | - | replicas
    planned replicas that have yet to be loaded
moesaic_move_arrival_age_seconds | - | seconds
    time since a planned replica last arrived, or since some are pending after there were none
moesaic_loaded_replicas_total | model | replicas
    replicas that hosts have loaded by order of the controller
moesaic_loaded_bytes_total | model | bytes
    size of their weights
moesaic_failed_loads_total | model | replicas
    replicas that hosts could not load; a load that fails counts with all its replicas
moesaic_model_experts | model | experts
    experts of all layers of the model
moesaic_model_asleep | model | 0 or 1
    1 if the experts have left the hosts because the model had no request for `idle_s`
moesaic_model_assignments_total | model | assignments
    assignments of all experts of the model, as routers count them
moesaic_model_weight_version | model | number
    the version of the experts' weights that is served; updates and training steps bring
    higher ones
moesaic_model_wanted_replicas | model | replicas
    replicas that each expert should have at least: the larger one of `models[].replicas` and
    `balance.redundancy` + 1
moesaic_missing_experts | model | experts
    experts that no host holds
moesaic_unprotected_experts | model | experts
    experts that the loss of one failure domain takes away
moesaic_updated_experts | model | experts
    experts whose weights were updated or trained since they were read from the checkpoint
moesaic_volatile_experts | model | experts
    updated experts whose weights no file has: they are lost with their last host
moesaic_routing_entropy_ratio | model layer | 0 to 1
    entropy of the experts' parts of the layer's assignments, divided by the largest possible
    one: 1 is even, 0 is a single expert. Of the last two samples of assignments, each with 20
    for each expert or more; absent before there were so many. Layers are those that a served
    model has
moesaic_routing_max_over_mean_ratio | model layer | ratio
    assignments of the layer's busiest expert, divided by their mean over all its experts
moesaic_dead_experts | model layer | experts
    experts of the layer without an assignment among these
moesaic_collapsed_layers | model | layers
    layers whose gates send nearly all tokens to the same few experts, or leave more than half
    of them dead, in three samples without a break; in 30 where no run trains the model
moesaic_expert_assignments_per_second | model layer expert | assignments per second
    load of one of the hottest experts, as a mean over about 10 s; `monitoring.hot_experts`
    says how many have a series
moesaic_expert_replicas | model layer expert | replicas
    hosts that hold one of the hottest experts
moesaic_hosts | state | hosts
    hosts by state; a state without hosts is 0
moesaic_host_state | host state | 1
    the state of the host, in the label
moesaic_host_ready | host | 0 or 1
    1 if the controller lists the host and its listener has answered a probe within the last
    seconds
moesaic_host_draining | host | 0 or 1
    1 if the host must become empty: drained by an operator, or leaving
moesaic_host_start_time_seconds | host | seconds since 1970
    when the host's process was started; it changes with each restart
moesaic_host_slots | host | replicas
    replicas for which the host has room; absent if its memory decides
moesaic_host_replicas | host | replicas
    replicas that the host holds
moesaic_host_loading_replicas | host | replicas
    replicas that the host is loading
moesaic_host_memory_limit_bytes | host | bytes
    memory that its experts may take, from the spec; absent if only slots bound them
moesaic_host_weights_bytes | host | bytes
    size of the weights that the host holds
moesaic_host_resident_memory_bytes | host | bytes
    resident memory of the host's process
moesaic_host_gpu_memory_used_bytes | host | bytes
    memory of its GPU that experts and PyTorch take; absent on a CPU
moesaic_host_gpu_memory_limit_bytes | host | bytes
    memory of its GPU that the process may take; absent without a limit
moesaic_host_calls_total | host | calls
    calls that the host answered
moesaic_host_rows_total | host | rows
    rows that the host computed: a token of one call is a row
moesaic_host_assignments_total | host | assignments
    assignments that the host computed: a row counts once for each of its experts
moesaic_host_batches_total | host | batches
    batches that the host computed
moesaic_host_refused_calls_total | host | calls
    calls that the host refused, or dropped because their router cancelled them
moesaic_host_received_bytes_total | host | bytes
    size of the tensors of the calls that the host answered
moesaic_host_sent_bytes_total | host | bytes
    size of the tensors of its answers
moesaic_host_busy_seconds_total | host | seconds
    time that the host's device computed; its rate is the busy share
moesaic_host_queue_seconds_total | host | seconds
    sum of the times that calls waited in the host's queue, as routers report them
moesaic_host_queued_rows | host | rows
    rows that wait to be computed
moesaic_host_connected_routers | host | routers
    routers that are connected to the host
moesaic_host_lending_routers | host | routers
    routers that compute with the host's memory instead of sending it calls
moesaic_host_owned_tensors | host | tensors
    experts and blocks of a trunk that the host owns for the training run; absent without one
moesaic_host_owned_bytes | host | bytes
    size of their masters, optimizer's state, and gradients in a step
moesaic_node_memory_bytes | node | bytes
    memory that a machine with hosts, or its container, may use, with swap
moesaic_node_free_memory_bytes | node | bytes
    what is free of it
moesaic_group_hosts | group | hosts
    hosts of a group of the spec, without those that leave; the label is its index in `hosts`
moesaic_group_min_hosts | group | hosts
    smallest number of hosts that the autoscaler keeps in the group
moesaic_group_max_hosts | group | hosts
    largest number of hosts of the group
moesaic_scaling_busy_ratio | - | 0 to 1
    mean fraction of time in which hosts compute, as the autoscaler sees it; absent before it is
    known, and where the number of hosts is fixed
moesaic_scaling_wait_ratio | - | ratio
    time that calls wait / time that their batches take; absent as the one above
moesaic_scaling_blocked | - | 0 or 1
    1 if hosts that should run cannot start
moesaic_routers | - | routers
    routers that follow placements: those of trunks, of the router service and of trainers
moesaic_router_calls_total | - | calls
    calls of layers, by all routers
moesaic_router_rows_total | - | rows
    rows of these calls
moesaic_router_lent_assignments_total | - | assignments
    assignments that routers computed themselves with memory that hosts lent; divided by all
    assignments, it is the lent share
moesaic_router_retries_total | - | sends
    sends whose assignments had to be sent again
moesaic_router_hedges_total | - | sends
    sends that repeated a late one
moesaic_router_hedge_wins_total | - | sends
    hedges that were answered before the send that they repeated
moesaic_router_ejections_total | - | ejections
    how often a router stopped to use a host that had missed a deadline
moesaic_router_lost_rows_total | - | rows
    rows that no host computed in time
moesaic_transport_connections | transport | connections
    connections from routers to hosts
moesaic_transport_sends_total | transport | sends
    sends from routers to hosts: a call of a layer is one send to each of its hosts
moesaic_transport_failures_total | transport | sends
    sends that were refused, or whose connection was lost
moesaic_transport_sent_bytes_total | transport | bytes
    size of the tensors that routers sent
moesaic_transport_received_bytes_total | transport | bytes
    size of the tensors of the answers
moesaic_transport_answer_seconds | transport | seconds | histogram
    time from a send to its answer
moesaic_router_service_up | - | 0 or 1
    1 if the router service is up; absent if the spec has none
moesaic_router_service_calls_total | - | calls
    calls that the router service answered
moesaic_router_service_rows_total | - | rows
    rows that it computed
moesaic_router_service_batches_total | - | batches
    batches that it computed
moesaic_router_service_refused_calls_total | - | calls
    calls that it refused because it was full
moesaic_router_service_expired_calls_total | - | calls
    calls that ended at their deadline
moesaic_router_service_held_calls | - | calls
    calls that wait or are computed now
moesaic_router_service_held_bytes | - | bytes
    size of their tensors and answers
moesaic_training_run | model | number
    the number of the run that trains the model; absent without one, as are the others
moesaic_training_age_seconds | model | seconds
    time since the run began
moesaic_training_steps_total | model | steps
    steps of the run that the pool serves
moesaic_training_attempt | model | number
    which attempt at the next step is under way; a second one means that something was lost
moesaic_training_workers | model | processes
    processes that compute the step
moesaic_training_unprotected_tensors | model | tensors
    experts and blocks of the trunk with a single owner, whose loss takes the run to a checkpoint
moesaic_training_step_seconds | model | seconds
    how long a step takes, the mean of the last ones; absent before the first one is done
moesaic_training_tokens_per_second | model | tokens per second
    tokens that these steps have learned from
moesaic_engine_healthy | model | 0 or 1
    1 if the model's trunk answers and its engine runs, or will start with the next request
moesaic_engine_running_requests | model | requests
    requests in the engine's batch. Of a model with several trunks, engine metrics are those
    of one that was chosen at random
moesaic_engine_waiting_requests | model | requests
    requests that wait for the batch
moesaic_engine_parked_requests | model | requests
    waiting requests that need an expert which no host has
moesaic_engine_steps_total | model | steps
    steps of the engine
moesaic_engine_restarts_total | model | restarts
    restarts of the engine after failed steps
moesaic_engine_beat_age_seconds | model | seconds
    time since the engine's loop last looked for work
moesaic_engine_free_cache_ratio | model | 0 to 1
    free part of the KV cache
moesaic_http_responses_total | path status | answers
    HTTP answers by path and status; paths that the endpoint does not have are `other`
moesaic_choices_total | model reason | choices
    choices by how they ended: a finish reason, the code of an error, or `abandoned`
moesaic_prompt_tokens_total | model | tokens
    tokens of prompts
moesaic_generated_tokens_total | model | tokens
    tokens of answers
moesaic_requests_running | model | requests
    requests that are being answered
moesaic_time_to_first_token_seconds | model | seconds | histogram
    time to a choice's first token
moesaic_inter_token_latency_seconds | model | seconds | histogram
    time between two tokens of a choice
moesaic_request_latency_seconds | model | seconds | histogram
    time to the end of a request
"""


def _metrics(table: str) -> dict[str, Metric]:
    heads: dict[str, list[str]] = {}
    for line in table.strip().splitlines():
        if line.startswith(" "):
            heads[next(reversed(heads))].append(line.strip())
        else:
            heads[line] = []
    found = []
    for head, words in heads.items():
        name, labels, unit, *more = head.split(" | ")
        known = () if labels == "-" else tuple(labels.split())
        found.append(Metric(name, known, unit, more == ["histogram"], " ".join(words)))
    return {metric.name: metric for metric in found}


METRICS = _metrics(_TABLE)
