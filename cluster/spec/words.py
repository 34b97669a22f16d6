"""What each key of the spec means, in words, for the JSON schema and for docs/spec.md.

A test keeps this complete.
"""

from __future__ import annotations

from typing import Any

_RESOURCES = {
    "num_cpus": "CPUs that Ray reserves for each of them.",
    "num_gpus": "GPUs that Ray reserves for each of them; fractions are possible.",
    "resources": "Ray's custom resources for each of them: name to amount.",
    "labels": "Node labels that each of them requires, as Ray's label selectors.",
}
_DEVICE = "`cpu`, `cuda`, `cuda:1`, or `auto`: CUDA if there is a GPU."

WORDS: dict[str, dict[str, str]] = {
    "Spec": {
        "name": "The cluster's name; the command line finds it by this name.",
        "ray": "The Ray to run on.",
        "network": "How routers reach hosts.",
        "models": "The models to serve; may be empty.",
        "hosts": "Groups of identical hosts.",
        "trunk": "The processes that hold the models' trunks, one deployment for each model.",
        "endpoint": "The HTTP endpoint; `null`: none.",
        "monitoring": "Address of the endpoint's `/status` and `/metrics`; `null`: not served.",
        "timeouts": "Time limits.",
        "balance": "When experts are moved between hosts, and what a move may cost.",
        "autoscale": "When hosts are added and removed.",
        "router": "The gRPC router service for clients that send hidden states; default: none.",
    },
    "RaySpec": {
        "address": "`local`: start a Ray within `moesaic up`; `auto` or host:port: join a running "
        "one.",
        "insecure": "`true`: also join a Ray without token authentication (docs/security.md).",
    },
    "NetworkSpec": {
        "bind": "Address on which hosts listen for gRPC; `node`: each node's own address.",
        "transport": "`auto`: shared memory on one node, gRPC between nodes. `shm`, `grpc`: only "
        "that one. `group`: torch.distributed. `device`: GPU memory and NCCL between GPUs, else "
        "as `auto`.",
    },
    "ModelSpec": {
        "name": "The name that clients use; may be a hub id with a slash.",
        "aliases": "Other names that requests may use.",
        "path": "A folder, a hub id, or `demo`.",
        "dtype": "Data type of the trunk and the experts.",
        "replicas": "Replicas of each expert, each on another host.",
        "exact": "Results are the same to the bit, whatever the placement and the batch.",
        "experts_per_token": "Experts per token for requests that do not set it, those with the "
        "largest gate weights; default: the model's own number.",
        "min_experts_per_token": "Lower bound for a request's `experts_per_token`; default: "
        "the model's `experts_per_token`.",
        "idle_s": "Seconds without a request until the model's experts leave the hosts; default: "
        "never.",
    },
    "HostGroup": _RESOURCES
    | {
        "count": "Number of hosts at the start.",
        "min_count": "Lower limit for the autoscaler; default: `count`.",
        "max_count": "Upper limit for the autoscaler and for operators; default: `count`.",
        "cost_per_hour": "Cost of one host, in the unit of `autoscale.max_cost_per_hour`.",
        "device": _DEVICE,
        "threads": "CPU threads of one computation; `auto` divides the cores among the hosts.",
        "slots": "Experts that one host may hold. Default without `memory_gb`: its even share of "
        "all replicas plus a quarter.",
        "memory_gb": "Memory for experts on one host, in GiB.",
        "speed": "Speed of one host relative to other groups.",
        "domain": "Failure domain of the group, such as a machine or rack; empty: each host is "
        "its own.",
        "spread": "Strategy of a Ray placement group for the hosts; `none`: Ray places each host "
        "by itself.",
        "max_rows": "Rows of one call.",
        "max_batch_rows": "Rows of one computation.",
        "max_queue_rows": "Rows that may wait; further calls are refused.",
        "emulate": "Make each batch take the time that another device would take.",
    },
    "EmulationSpec": {
        "call_us": "Microseconds to start a batch.",
        "row_us": "Microseconds for each assignment (a row and one of its experts).",
        "expert_us": "Microseconds for each expert that a batch reads.",
    },
    "TrunkSpec": _RESOURCES
    | {
        "engine": "The engine that batches requests and runs the trunk; `vllm` must be installed.",
        "compiled": "Let vLLM compile the layers around the experts: faster, but slower to start.",
        "device": _DEVICE,
        "threads": "CPU threads of one computation; `auto`: all cores.",
        "max_requests": "Requests in one batch.",
        "max_waiting": "Requests that may wait for a place in the batch; more are refused.",
        "max_batch_tokens": "Tokens of one step; limits how long a prompt delays other requests.",
        "cache_tokens": "Tokens that fit into the key-value cache.",
        "min_replicas": "Lower limit of trunks for each model; 0: the first request starts one.",
        "max_replicas": "Upper limit of trunks for each model.",
        "target_requests": "Requests per trunk that Serve's autoscaler aims at.",
    },
    "EndpointSpec": {
        "host": "Address to listen on.",
        "port": "Port to listen on; 0 takes a free one.",
        "cors_origins": "Origins whose web pages may use the endpoint from a browser; `*`: all.",
        "allowed_hosts": "Further names that requests may have in their Host header; `*`: all.",
        "limits": "Limits of one request.",
        "drain_s": "Seconds that running answers and router service calls have when the cluster "
        "ends; new ones are refused.",
    },
    "MonitoringSpec": {
        "host": "Address to listen on.",
        "port": "Port to listen on; 0 takes a free one.",
    },
    "RouterSpec": {
        "host": "Address to listen on.",
        "port": "Port to listen on; 0 takes a free one.",
        "max_batch_rows": "Rows of one merged call; calls of the same layer are merged.",
        "max_calls": "Calls held at the same time.",
        "max_mb": "Megabytes of tensors and answers held at the same time.",
        "max_call_mb": "Megabytes of tensors in one call.",
        "call_s": "Seconds that one call may take.",
    },
    "LimitSpec": {
        "prompt_tokens": "Tokens of a prompt; default: what the model and the cache allow.",
        "answer_tokens": "Tokens of an answer; default: what the model and the cache allow.",
        "request_s": "Seconds until the last token; default: no limit.",
        "body_mb": "Megabytes of a request's body.",
        "body_s": "Seconds in which the body must arrive.",
        "bodies_mb": "Megabytes of all bodies that arrive or are parsed at the same time.",
        "min_priority": "Smallest priority that a request may ask for; smaller ones go first, and "
        "the default is 0.",
        "max_priority": "Largest priority that a request may ask for.",
    },
    "TimeoutSpec": {
        "expert_s": "Seconds that a call waits for an expert that no host can compute.",
        "attempt_s": "Seconds until a call to a silent host is sent to another replica.",
        "start_s": "Seconds for the whole start of a cluster, or of a trunk.",
    },
    "BalanceSpec": {
        "auto": "Adapt the placement to the load without an operator's command.",
        "redundancy": "Failure domains that can be lost at once without losing an expert.",
        "enough": "Layers of at least this balancedness are left alone.",
        "target": "Other layers are improved up to this balancedness.",
        "budget": "Replicas that one plan may load: a fraction of all, or bytes such as `4GB`.",
        "fan_out": "A layer uses a further host only for more than this fraction of the load that "
        "the busiest layer has per host. 0: all layers use all hosts.",
        "every_s": "Seconds between two checks of the load.",
        "horizon_s": "Seconds over which the cost of moving replicas is amortised.",
        "gone_s": "Seconds until the experts of an unreachable host are placed elsewhere.",
        "lease_s": "Seconds after which a silent router no longer delays evictions.",
        "load_mb_per_s": "Megabytes per second that one host loads in the background.",
    },
    "AutoscaleSpec": {
        "high": "Hosts are added above this fraction of time in which they compute.",
        "low": "Hosts are removed below this fraction of time in which they compute.",
        "up_after_s": "Seconds above `high` before hosts are added.",
        "down_after_s": "Seconds below `low` before hosts are removed.",
        "cooldown_s": "Seconds between two changes.",
        "pending_s": "Seconds until a host that is not up is shown as waiting for a machine.",
        "max_cost_per_hour": "Largest cost of all hosts together; default: no limit.",
    },
}


def with_words(schema: dict[str, Any], model: type[Any]) -> None:
    """Add the words to a model's schema; used as pydantic's ``json_schema_extra``."""
    for name, words in WORDS.get(model.__name__, {}).items():
        if name in schema.get("properties", {}):
            schema["properties"][name]["description"] = words
