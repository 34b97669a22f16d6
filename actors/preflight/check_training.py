"""Check what training asks of a model and of this machine's memory.

Which parameters are trained, and with which optimizer, is decided later. The plan assumes all of
them and AdamW, the default of `PoolOptimizer`; a run that begins is planned exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ...cluster.card_memory import gb
from ...cluster.spec.spec import ModelSpec, Spec
from ...cluster.training.host_memory import (
    BESIDES_TENSORS_BYTES,
    HostMemory,
    TrainedBytes,
    pool_memory,
)
from ...kernels.training.update_rules import UpdateRule
from ...models.trunk.describe import HOST_BYTES, ModelDescription
from ...proto.errors import UnsupportedModel
from ..runtime.devices import machine_memory
from .findings import Finding

ASSUMED = "AdamW"


def check_training(model: ModelSpec, described: ModelDescription, at: str) -> Iterator[Finding]:
    """Check that the experts of a model that is to be trained have gradients."""
    if model.train and described.quantised is not None:
        text = (
            f"the checkpoint of model {model.name!r} is quantised ({described.quantised}), and "
            "such weights cannot be trained; use a checkpoint in float32, bfloat16 or float16, or "
            "set train: false"
        )
        code = UnsupportedModel.__name__
        yield Finding(severity="error", path=f"{at}.train", message=text, code=code)


def check_training_memory(spec: Spec, models: Mapping[str, ModelDescription]) -> Iterator[Finding]:
    """Compare what hosts on CPUs take in a training step with this machine's memory.

    One run trains at a time; other models keep their weights. All findings are warnings, because a
    run may train less, and is planned exactly when it begins. Weights that do not fit are another
    check's error.
    """
    replicas = {model.name: model.replicas for model in spec.models}
    trunks = max(1, spec.trunk.min_replicas) if spec.endpoint is not None else 0
    total, free = machine_memory()
    for number, model in enumerate(spec.models):
        if not model.train or model.name not in models:
            continue
        described = models[model.name]
        others = sum(one.trunk_bytes * trunks for one in models.values())
        others += sum(
            one.experts_bytes * replicas[name] for name, one in models.items() if name != model.name
        )
        hosts = plan_training(spec, model, described)
        bare = others + hosts.without_state().peak
        # The process that trains has the trunk's weights, and gradients of the same type.
        processes = spec.num_hosts + trunks * len(models) + 1
        wanted = others + hosts.peak + 2 * described.trunk_bytes
        wanted += HOST_BYTES * processes + BESIDES_TENSORS_BYTES * spec.num_hosts
        path, name = f"models.{number}.train", repr(model.name)
        if others + hosts.weights > total:
            continue
        if bare > total:
            text = f"masters, gradients and two versions of the weights of {name} need {gb(bare)} "
            text += f"of memory, whatever the optimizer, and this machine has {gb(total)}; use "
            text += "fewer replicas, less redundancy, bfloat16, or a Ray of several machines "
            yield Finding(severity="warning", path=path, message=f"{text}(ray.address)")
        elif wanted > free:
            text = f"to train all of {name} with {ASSUMED} takes {gb(wanted)} of memory, "
            text += f"of which hosts need {gb(hosts.masters)} for masters, {gb(hosts.state)} for "
            text += f"the optimizer's state, {gb(hosts.weights)} for a second version of the "
            text += f"weights and {gb(hosts.passing)} for gradients; this machine has {gb(free)} "
            text += f"free of {gb(total)}: use fewer replicas, less redundancy or bfloat16, train "
            text += "a part of the model, or choose an optimizer with less state"
            yield Finding(severity="warning", path=path, message=text)


def plan_training(spec: Spec, model: ModelSpec, described: ModelDescription) -> HostMemory:
    """Return what all hosts take together to train all of a model with AdamW."""
    rule, dtype = UpdateRule(ASSUMED), getattr(torch, model.dtype)

    def sizes(nbytes: int) -> TrainedBytes:
        count = nbytes // dtype.itemsize
        one = rule.bytes_of((count,), dtype)
        added = torch.float64.itemsize * count if model.exact else one.gradient
        return TrainedBytes(nbytes, one.gradient, added, one.master, one.state)

    return pool_memory(
        sizes(described.experts_bytes),
        sizes(described.trunk_bytes),
        replicas=model.replicas,
        redundancy=spec.balance.redundancy,
        hosts=spec.num_hosts,
    )
