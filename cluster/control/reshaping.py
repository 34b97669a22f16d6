"""A running pool follows another spec: models that leave or change, and another policy."""

from __future__ import annotations

from ..placement import ModelShape
from ..planner.constraints import without_model
from .control import Control
from .policy import ControlPolicy


def change_model(control: Control, shape: ModelShape) -> None:
    """Keep another number of replicas of a model's experts, or let it sleep at another time."""
    control.models[shape.model] = shape


def check_leaves(control: Control, model: str) -> None:
    """Raise ValueError while a model cannot leave: it is trained, or its weights are updated."""
    run = control.training.alive
    if run is not None and run.model == model:
        raise ValueError(f"models.{model}: {run}; end the run first")
    if control.updates.is_updating(model):
        raise ValueError(f"models.{model}: its weights are being updated; try again when that ends")


def remove_model(control: Control, model: str) -> None:
    """Serve a model no more; hosts evict its experts once no router can ask for them."""
    del control.models[model]
    control.removed.add(model)
    control.loader.on_disk.discard(model)
    control.updates.forget(model)
    control.idle_models.forget(model)
    control.loads.forget(model)
    control.set_constraints(without_model(control.constraints, model))
    if control.target.layers is not None:
        left = {key: layer for key, layer in control.target.layers.items() if key.model != model}
        control.target.set_layers(left)
        control.target.unplaced = tuple(e for e in control.target.unplaced if e.model != model)


def follow(control: Control, policy: ControlPolicy) -> None:
    """Act by another policy from now on."""
    control.policy = policy
    control.view.host_timeout_s = policy.host_timeout_s
    control.publisher.lease_s = policy.lease_s
    control.loader.follow(policy.bytes_per_s, policy.batch_bytes, policy.retry_s)
    control.impact_meter.follow(policy.every_s, policy.balance.consolidate_below)
    control.rebalance_timer.every_s = policy.every_s
    control.replan()
