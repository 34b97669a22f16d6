"""Check that what the spec puts on this machine's cards (GPUs) fits into their memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ...cluster.card_memory import (
    LEAST_WORKSPACE_BYTES,
    CardPlan,
    CardProcess,
    cached_bytes,
    plan_cards,
)
from ...cluster.spec.spec import HostGroup, Spec
from ...models.trunk.describe import ModelDescription
from ..runtime.devices import visible_cards
from .findings import Finding


def check_cards(plan: CardPlan) -> Iterator[Finding]:
    """Turn what does not fit into findings."""
    for problem in plan.problems:
        yield Finding(severity=problem.severity, path=problem.key, message=problem.message)


def plan_of(spec: Spec, models: Mapping[str, ModelDescription]) -> CardPlan:
    """Plan the memory of this machine's cards; without any the plan is empty."""
    cards = visible_cards()
    if not cards:
        return CardPlan()
    processes, cpu_hosts = [], []
    trained = {model.name for model in spec.models if model.train}
    for number, group in enumerate(spec.hosts):
        most = _most_expert_bytes(group, models)
        if group.device == "cpu":
            cpu_hosts += [most] * group.count
            continue
        batch_rows = group.limits.policy(gpu=True).max_batch_rows
        host = CardProcess(
            share=group.card_share(f"hosts.{number}", trains=spec.trains),
            device=_number(group.device),
            holds_experts=True,
            most_expert_bytes=most,
            workspace_bytes=max(
                [LEAST_WORKSPACE_BYTES]
                + [_call_bytes(one, batch_rows, name in trained) for name, one in models.items()]
                + [one.expert_bytes for one in models.values()]
            ),
        )
        processes += [host] * group.count
    if spec.endpoint is not None and spec.trunk.device != "cpu":
        for model in models.values():
            processes += [_trunk(spec, model)] * max(1, spec.trunk.min_replicas)
    replicas = {model.name: model.replicas for model in spec.models}
    sizes = {name: one.experts_bytes * replicas[name] for name, one in models.items()}
    return plan_cards(
        cards,
        processes,
        expert_bytes=sum(sizes.values()),
        cpu_hosts=cpu_hosts,
        second_bytes=sum(
            sizes.get(model.name, 0)
            for model in spec.models
            if model.train or model.updates is not None
        ),
    )


def _trunk(spec: Spec, model: ModelDescription) -> CardProcess:
    trunk = spec.trunk
    workspace = LEAST_WORKSPACE_BYTES
    if trunk.engine == "transformers":
        # Its attention copies what it reads of the cache; vLLM's reads in place.
        tokens = trunk.cache_tokens + trunk.max_batch_tokens
        workspace += tokens * model.attention_token_bytes
    cache = cached_bytes(trunk.cache_tokens, model.cache_token_bytes)
    return CardProcess(
        share=trunk.card_share("trunk"),
        device=_number(trunk.device),
        weight_bytes=model.trunk_bytes + cache,
        workspace_bytes=workspace,
    )


def _most_expert_bytes(group: HostGroup, models: Mapping[str, ModelDescription]) -> int | None:
    """Return what one host of a group may hold of experts, as slots and memory_gb say."""
    limits = [] if group.fleet.memory_bytes is None else [group.fleet.memory_bytes]
    if group.slots is not None:
        limits.append(group.slots * max((one.expert_bytes for one in models.values()), default=0))
    return min(limits, default=None)


def _call_bytes(model: ModelDescription, rows: int, learns: bool) -> int:
    """Return about what the computation of so many rows takes besides the experts.

    ``learns``: their backward half, which keeps more of them.
    """
    item = getattr(torch, model.dtype).itemsize
    # Two matrices of an expert are as large as its hidden rows times its width, or more.
    width = model.expert_bytes // (2 * model.hidden_size * item)
    assignment = ((2 if learns else 1) * width + model.hidden_size) * item
    row = model.hidden_size * (item + (2 if learns else 1) * torch.float32.itemsize)
    return rows * ((model.top_k or 1) * assignment + row)


def _number(device: str) -> int:
    """Return the number of a device such as cuda:1; cuda and auto are the first one."""
    return int(device.partition(":")[2] or 0)
