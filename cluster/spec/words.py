"""What each key of the spec means, in words: for the JSON schema and for docs/spec.md. A test keeps
it complete."""

from __future__ import annotations

from typing import Any

_RESOURCES = {
    "num_cpus": "CPUs that Ray reserves for each.",
    "num_gpus": "GPUs that Ray reserves for each; parts of one are possible.",
    "resources": "Ray's custom resources: name to amount.",
    "labels": "Labels that a node must have, as Ray's label selectors.",
}
_DEVICE = "`cpu`, `cuda`, `cuda:1`, or `auto`: CUDA where there is one."

WORDS: dict[str, dict[str, str]] = {
    "Spec": {
        "name": "The cluster's name, by which the command line finds it.",
        "ray": "Where Ray runs.",
        "network": "How hosts are reached.",
        "models": "The models that are served; there may be none.",
        "hosts": "Groups of like hosts.",
        "trunk": "The processes that hold the models' trunks, one deployment for each model.",
        "endpoint": "The HTTP endpoint; `null`: none.",
        "monitoring": "Where the endpoint's `/status` and `/metrics` are; `null`: nowhere.",
        "timeouts": "Deadlines.",
        "balance": "When experts move, and what a move may cost.",
        "autoscale": "When hosts come and go.",
        "router": "The gRPC service for clients that bring hidden states; without: none.",
    },
    "RaySpec": {
        "address": "`local`: one inside the process of `up`; `auto` or host:port: one that runs.",
        "insecure": "`true`: a Ray without token authentication is taken, too (docs/security.md).",
    },
    "NetworkSpec": {
        "bind": "Where hosts listen for gRPC: an address, or `node`: each node's own.",
        "transport": "`auto`: shared memory on one node, gRPC between nodes; `shm` or `grpc` "
        "alone; `group`: torch.distributed; `device`: GPUs' memory and NCCL, else as `auto`.",
    },
    "ModelSpec": {
        "name": "What clients call it; a hub id has a slash.",
        "aliases": "Other names that requests may use.",
        "path": "A folder, a hub id, or `demo`.",
        "dtype": "Of the trunk and of the experts.",
        "replicas": "Of each expert, every one on another host.",
        "exact": "Results do not depend on placement or batch, to the bit.",
        "experts_per_token": "Of the largest gate weights, where a request says nothing; without: "
        "the model's own number.",
        "min_experts_per_token": "As few may a request ask for; without: none but the default.",
        "idle_s": "Its experts leave the hosts when nobody asks for so long; without: never.",
    },
    "HostGroup": _RESOURCES
    | {
        "count": "Hosts at the start.",
        "min_count": "The autoscaler leaves at least so many; without: `count`.",
        "max_count": "The autoscaler has at most so many; without: `count`.",
        "cost_per_hour": "Of one host, in the unit of `autoscale.max_cost_per_hour`.",
        "device": _DEVICE,
        "threads": "Of one computation; `auto` shares the cores out.",
        "slots": "Experts that one host may hold; without both bounds its even part and a quarter.",
        "memory_gb": "GiB of experts that one host may hold.",
        "speed": "Relative to other groups.",
        "domain": "What fails together; empty: each host alone.",
        "spread": "Ray's placement group for the hosts; `none`: Ray spreads them as it can.",
        "max_rows": "Rows of one call.",
        "max_batch_rows": "Rows of one computation.",
        "max_queue_rows": "Rows that wait; calls beyond are refused.",
        "emulate": "Let each batch take the time of another device.",
    },
    "EmulationSpec": {
        "call_us": "Microseconds for starting a batch.",
        "row_us": "Microseconds for each row of each expert.",
        "expert_us": "Microseconds for each expert that a batch reads.",
    },
    "TrunkSpec": _RESOURCES
    | {
        "engine": "What batches requests and runs the trunk; `vllm` where it is installed.",
        "compiled": "vLLM compiles what is around the experts: quicker, and slower to start.",
        "device": _DEVICE,
        "threads": "Of one computation; `auto`: all cores.",
        "max_requests": "In one batch.",
        "max_waiting": "Requests beyond those that run; more are refused.",
        "max_batch_tokens": "Of one step: bounds how long a prompt delays the others.",
        "cache_tokens": "Room in the key-value cache.",
        "min_replicas": "Trunks of each model at least; 0: the first request starts one.",
        "max_replicas": "Trunks of each model at most.",
        "target_requests": "What each trunk is to have, when there are several.",
    },
    "EndpointSpec": {
        "host": "Where it listens.",
        "port": "0 takes a free one.",
        "cors_origins": "Whose pages may use it from within a browser; `*`: all.",
        "allowed_hosts": "Further names by which it may be asked for; `*`: all.",
        "limits": "What one request may ask for.",
        "drain_s": "Seconds for running answers, and calls of the router service, when the cluster "
        "ends; new ones are refused.",
    },
    "MonitoringSpec": {
        "host": "Where it listens.",
        "port": "0 takes a free one.",
    },
    "RouterSpec": {
        "host": "Where it listens.",
        "port": "0 takes a free one.",
        "max_batch_rows": "Rows of merged calls of one layer.",
        "max_calls": "Calls that are held at a time.",
        "max_mb": "Megabytes of tensors and answers that are held at a time.",
        "max_call_mb": "Megabytes of one call's tensors.",
        "call_s": "Seconds that one call may take.",
    },
    "LimitSpec": {
        "prompt_tokens": "Of one prompt; without: what the model and the cache allow.",
        "answer_tokens": "Of one answer; without: what the model and the cache allow.",
        "request_s": "Seconds to its last token; without: any.",
        "body_mb": "Megabytes of its body.",
        "body_s": "Seconds for its body to arrive.",
        "bodies_mb": "Megabytes of the bodies of all requests that arrive or are parsed.",
        "min_priority": "The smallest that it may ask for: it goes before those that say nothing.",
        "max_priority": "The largest that it may ask for.",
    },
    "TimeoutSpec": {
        "expert_s": "How long a call waits for an expert that is nowhere.",
        "attempt_s": "Before a host that does not answer is given up.",
        "start_s": "For the whole start of a cluster, or of a trunk.",
    },
    "BalanceSpec": {
        "auto": "Follow the load without being asked.",
        "redundancy": "Domains that can be lost at once without losing an expert.",
        "enough": "A layer of this balancedness is left alone; others are improved,",
        "target": "up to this one.",
        "budget": "Of all replicas, the part that is loaded anew each time; or bytes, as `4GB`.",
        "fan_out": "A layer takes another host only for this part of the busiest layer's load; 0: "
        "all layers are on all hosts.",
        "every_s": "Between two looks at the load.",
        "horizon_s": "So long a better placement must last to pay for its moves.",
        "gone_s": "A host that is away for so long has its experts placed elsewhere.",
        "lease_s": "A router that is silent for so long holds up no eviction.",
        "load_mb_per_s": "Megabytes a second that one host loads where nobody waits for them.",
    },
    "AutoscaleSpec": {
        "high": "Hosts come above this busy part of their time,",
        "low": "and go below this one.",
        "up_after_s": "So long it must be above `high`.",
        "down_after_s": "So long it must be below `low`.",
        "cooldown_s": "Between two changes.",
        "pending_s": "A host that is not up by then is shown as waiting for a machine.",
        "max_cost_per_hour": "Of all hosts together; without: no limit.",
    },
}


def with_words(schema: dict[str, Any], model: type[Any]) -> None:
    """For pydantic's ``json_schema_extra``."""
    for name, words in WORDS.get(model.__name__, {}).items():
        if name in schema.get("properties", {}):
            schema["properties"][name]["description"] = words
