"""Check everything that can be checked before a cluster starts.

`up` does this first, and `moesaic spec check` does nothing else. It imports no Ray, downloads
nothing, and reads no tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...cluster.card_memory import PlannedCard
from ...cluster.placement import ModelShape
from ...cluster.spec.spec import ModelSpec, Spec
from ...models.source import NotDownloaded, local_model
from ...models.trunk.describe import ModelDescription
from ...proto.errors import MoesaicError, UnsupportedModel
from ..engine.engine import ExpertBounds
from .check_cards import check_cards, plan_of
from .check_machine import (
    check_engine,
    check_local,
    check_platform,
    check_ports,
    check_room,
    check_token,
)
from .check_model import check_model
from .check_training import check_training
from .check_updates import check_update_folders, check_updates
from .findings import Finding, finding_of


@dataclass(slots=True)
class Preflight:
    """The findings, and what was learned about the models that could be checked."""

    findings: list[Finding] = field(default_factory=list)
    folders: dict[str, Path] = field(default_factory=dict)
    described: dict[str, ModelDescription] = field(default_factory=dict)
    cards: list[PlannedCard] = field(default_factory=list)  # that processes here will use


def preflight(spec: Spec, *, local: bool | None = None, runs: bool = False) -> Preflight:
    """Check all of ``spec``; problems become findings, and are not raised.

    ``local``: whether the cluster's processes will be on this machine; None: if the spec says
    so. ``runs``: the cluster is there, and has its ports and its part of the machine already.
    """
    local = spec.ray.address == "local" if local is None else local
    found = Preflight()
    shapes = []
    for n, model in enumerate(spec.models):
        _check_model(found, spec, model, f"models.{n}")
        if described := found.described.get(model.name):
            shapes.append(shape_of(model, described))
    found.findings += check_update_folders(spec)
    found.findings += check_engine(spec)
    found.findings += check_room(spec, shapes)
    if runs:
        return found
    found.findings += check_ports(spec, local=local)
    found.findings += check_token(spec, local=local)
    if local:
        found.findings += check_platform()
        found.findings += check_local(spec, found.described)
        plan = plan_of(spec, found.described)
        found.cards = [card for card in plan.cards if card.processes]
        wrong = {one.path for one in found.findings if one.severity == "error"}
        found.findings += [one for one in check_cards(plan) if one.path not in wrong]
    return found


def _check_model(found: Preflight, spec: Spec, model: ModelSpec, at: str) -> None:
    key = f"{at}.path"
    try:
        folder = local_model(model.path)
    except MoesaicError as error:
        found.findings.append(finding_of(error, key))
        return
    if isinstance(folder, NotDownloaded):
        found.findings.append(Finding(severity="unchecked", path=key, message=folder.why))
        return
    found.folders[model.name] = folder
    serves = "error" if spec.endpoint is not None else None
    checked = check_model(folder, getattr(torch, model.dtype), key=key, tokenizer=serves)
    found.findings += checked.findings
    if checked.described is None:
        return
    found.described[model.name] = checked.described
    if model.updates is not None:
        found.findings += check_updates(model.updates, model.name, folder, key=f"{at}.updates")
    found.findings += check_experts(model, checked.described, at)
    found.findings += check_weights(spec, model, checked.described)
    found.findings += check_training(model, checked.described, at)


def check_experts(model: ModelSpec, described: ModelDescription, at: str) -> Iterator[Finding]:
    """Check that the spec asks for no more experts per token than the model has."""
    most = described.top_k
    for name in ("experts_per_token", "min_experts_per_token"):
        value = getattr(model, name)
        if value is not None and most is not None and value > most:
            text = f"{value}, but {model.name!r} has {most} experts per token; set at most {most}"
            yield Finding(severity="error", path=f"{at}.{name}", message=text)


def check_weights(spec: Spec, model: ModelSpec, described: ModelDescription) -> Iterator[Finding]:
    """Check that the engine of the trunks can read the model's weights."""
    if spec.endpoint is None or spec.trunk.engine != "vllm" or described.quantised is None:
        return
    text = (
        f"vllm cannot read the trunk of model {model.name!r}, whose checkpoint is quantised "
        f"({described.quantised}); set `engine: transformers`, or use a checkpoint in float32, "
        "bfloat16 or float16"
    )
    code = UnsupportedModel.__name__
    yield Finding(severity="error", path="trunk.engine", message=text, code=code)


def bounds_of(model: ModelSpec, described: ModelDescription) -> ExpertBounds:
    """Return how many experts per token requests may ask for."""
    return ExpertBounds(
        maximum=described.top_k,
        default=model.experts_per_token,
        minimum=model.min_experts_per_token,
    )


def shape_of(model: ModelSpec, described: ModelDescription) -> ModelShape:
    """Return what the planner needs to place a model."""
    return ModelShape(
        model=model.name,
        experts=described.layers,
        replicas=model.replicas,
        exact=model.exact,
        idle_s=model.idle_s,
        expert_bytes=described.expert_bytes,
        experts_per_token=described.top_k,
    )
