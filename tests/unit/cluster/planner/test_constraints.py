"""What operators ask for, and what a plan does not grant of it."""

from __future__ import annotations

import numpy as np
import pytest

from moesaic.cluster.expert_keys import ExpertKey, LayerKey
from moesaic.cluster.placement import ModelShape
from moesaic.cluster.planner.constraints import (
    unmet_constraints,
    with_min_replicas,
    with_pin,
    without_pin,
)
from moesaic.cluster.planner.plan import OperatorConstraints, Plan, PlannerPolicy, PoolHost
from moesaic.cluster.planner.planner import plan

SHAPE = ModelShape(model="m", experts={0: 4}, expert_bytes=1)
KEY = ExpertKey("m", 0, 1)
HOSTS = ("h0", "h1", "h2")


def planned(constraints: OperatorConstraints, slots: tuple[int, int, int]) -> Plan:
    return plan(
        models=[SHAPE],
        hosts=[PoolHost(name=n, slots=s) for n, s in zip(HOSTS, slots, strict=True)],
        current={},
        loads={LayerKey("m", 0): np.ones(4)},
        policy=PlannerPolicy(),
        constraints=constraints,
    )


def test_what_has_room_is_granted() -> None:
    constraints = with_pin(with_min_replicas(OperatorConstraints(), KEY, 3, HOSTS), KEY, "h2")
    assert unmet_constraints(planned(constraints, (3, 2, 2)), constraints, KEY) == []


def test_replicas_without_room_are_named() -> None:
    constraints = with_min_replicas(OperatorConstraints(), KEY, 3, HOSTS)
    assert unmet_constraints(planned(constraints, (2, 3, 0)), constraints, KEY) == [
        "expert 1 of layer 0 of m: the hosts have room for only 2 of 3 replicas"
    ]


def test_pins_without_room_are_named() -> None:
    constraints = with_pin(with_pin(OperatorConstraints(), KEY, "h1"), KEY, "h2")
    assert unmet_constraints(planned(constraints, (4, 1, 0)), constraints, KEY) == [
        "expert 1 of layer 0 of m: no room on h2"
    ]
    constraints = without_pin(constraints, KEY, "h2")
    assert unmet_constraints(planned(constraints, (4, 1, 0)), constraints, KEY) == []


def test_more_replicas_than_hosts_are_refused() -> None:
    with pytest.raises(ValueError, match="replicas: 4; choose a number from 1 to 3"):
        with_min_replicas(OperatorConstraints(), KEY, 4, HOSTS)
