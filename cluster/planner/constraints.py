"""Operators' constraints for a placement, and the report on a plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace

from ..expert_keys import ExpertKey, LayerKey
from ..placement import ModelShape
from ..reports.placing import LayerPlan, MoveKind, PlannedDrop, PlannedMove, PlanReport
from ..reports.report import ExpertId, balancedness_of
from .plan import OperatorConstraints, Plan
from .upkeep import ReplicaUpkeep


def check_model(models: Mapping[str, ModelShape], model: str) -> ModelShape:
    """Return the model's shape. Raises ValueError if there is no such model."""
    if model not in models:
        raise ValueError(f"model: {model!r} does not exist; choose one of {sorted(models)}")
    return models[model]


def check_layer(shape: ModelShape, layer: int) -> None:
    """Raise ValueError if a layer has no experts."""
    if layer not in shape.experts:
        layers = sorted(shape.experts)
        raise ValueError(
            f"layer: {layer} of {shape.model} has no experts; choose one of layers {layers[0]} to "
            f"{layers[-1]}"
        )


def check_expert(models: Mapping[str, ModelShape], key: ExpertKey) -> None:
    """Raise ValueError that says what is wrong if ``key`` does not exist."""
    shape = check_model(models, key.model)
    check_layer(shape, key.layer)
    if not 0 <= key.expert < shape.experts[key.layer]:
        raise ValueError(
            f"expert: {key.expert} does not exist; layer {key.layer} has the experts 0 to "
            f"{shape.experts[key.layer] - 1}"
        )


def check_host(hosts: Collection[str], host: str) -> None:
    """Raise ValueError if there is no such host."""
    if host not in hosts:
        raise ValueError(f"host: {host!r} does not exist; choose one of {', '.join(sorted(hosts))}")


def with_min_replicas(
    constraints: OperatorConstraints, key: ExpertKey, count: int, hosts: Collection[str]
) -> OperatorConstraints:
    """Require at least ``count`` replicas; 1 revokes that. Raises ValueError on bad counts."""
    if not 1 <= count <= len(hosts):
        raise ValueError(
            f"replicas: {count}; choose a number from 1 to {len(hosts)}, the number of hosts"
        )
    least = {k: n for k, n in constraints.min_replicas.items() if k != key}
    return replace(constraints, min_replicas=least | ({key: count} if count > 1 else {}))


def with_pin(constraints: OperatorConstraints, key: ExpertKey, host: str) -> OperatorConstraints:
    """Require that ``host`` always holds the expert."""
    pins = constraints.pins.get(key, frozenset()) | {host}
    return replace(constraints, pins={**constraints.pins, key: pins})


def without_pin(constraints: OperatorConstraints, key: ExpertKey, host: str) -> OperatorConstraints:
    """Revoke a pin."""
    left = constraints.pins.get(key, frozenset()) - {host}
    others = {k: v for k, v in constraints.pins.items() if k != key}
    return replace(constraints, pins=others | ({key: left} if left else {}))


def with_drain(
    constraints: OperatorConstraints, host: str, hosts: Collection[str]
) -> OperatorConstraints:
    """Require that ``host`` becomes empty. Raises ValueError if no other host would be left."""
    leaving = constraints.leaving | {host}
    if not set(hosts) - leaving:
        raise ValueError(
            f"host: {host} is the last host, and no other can take its experts; add a host first"
        )
    return replace(constraints, leaving=leaving)


def without_drain(constraints: OperatorConstraints, host: str) -> OperatorConstraints:
    """Revoke a drain."""
    return replace(constraints, leaving=constraints.leaving - {host})


def without_host(constraints: OperatorConstraints, host: str) -> OperatorConstraints:
    """Remove all constraints that name a host, which was removed."""
    pins = {key: hosts - {host} for key, hosts in constraints.pins.items()}
    return replace(
        constraints,
        pins={key: hosts for key, hosts in pins.items() if hosts},
        leaving=constraints.leaving - {host},
    )


def without_model(constraints: OperatorConstraints, model: str) -> OperatorConstraints:
    """Remove all constraints on experts of a model, which is not served any more."""
    return replace(
        constraints,
        min_replicas={k: n for k, n in constraints.min_replicas.items() if k.model != model},
        pins={key: hosts for key, hosts in constraints.pins.items() if key.model != model},
    )


def unmet_constraints(plan: Plan, constraints: OperatorConstraints, key: ExpertKey) -> list[str]:
    """Return a text for each constraint on an expert that a plan does not grant."""
    hosts = plan.layers[LayerKey(key.model, key.layer)].hosts(key.expert)
    least = constraints.min_replicas.get(key, 1)
    found = []
    if len(hosts) < least:
        found.append(f"{key}: the hosts have room for only {len(hosts)} of {least} replicas")
    lacking = sorted(constraints.pins.get(key, frozenset()) - set(hosts))
    if lacking:
        found.append(f"{key}: no room on {', '.join(lacking)}")
    return found


def plan_report(
    plan: Plan, *, bytes_per_s: float, unprotected_now: int, upkeep: ReplicaUpkeep | None = None
) -> PlanReport:
    """Return the report on a plan; ``bytes_per_s`` is how fast one host loads."""
    per_host: dict[str, int] = defaultdict(int)
    for move in plan.moves:
        per_host[move.host] += move.expert_bytes
    return PlanReport(
        moves=[
            PlannedMove(
                **move.key._asdict(),
                host=move.host,
                kind=MoveKind(move.kind),
                reason=move.reason,
                weight_bytes=move.expert_bytes,
                replaces=[_id(key) for key in move.replaces],
            )
            for move in plan.moves
        ],
        drops=[PlannedDrop(**key._asdict(), host=host) for key, host in plan.drops],
        weight_bytes=plan.move_bytes,
        expected_s=round(max(per_host.values(), default=0) / bytes_per_s, 1),
        balancedness_before=balancedness_of(list(plan.before.values())),
        balancedness_after=balancedness_of(list(plan.after.values())),
        layers=[
            LayerPlan(
                model=key.model,
                layer=key.layer,
                balancedness_before=round(float(plan.before[key]), 4),
                balancedness_after=round(float(plan.after[key]), 4),
            )
            for key in plan.layers
        ],
        unprotected_experts_before=unprotected_now,
        unprotected_experts_after=_alone(plan),
        unplaced_experts=[_id(key) for key in plan.unplaced],
        lacking_bytes=plan.lacking_bytes,
        upkeep=None if upkeep is None else upkeep.report(),
    )


def _id(key: ExpertKey) -> ExpertId:
    return ExpertId(**key._asdict())


def _alone(plan: Plan) -> int:
    """Return how many experts have one replica, so that they are lost with its host."""
    return sum(len(e) == 1 for layer in plan.layers.values() for e in layer.replicas)
