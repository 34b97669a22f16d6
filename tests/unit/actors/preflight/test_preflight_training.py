"""What a preflight finds of the memory that training takes on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesaic.actors.preflight import check_machine, check_training
from moesaic.actors.preflight.check_training import plan_training
from moesaic.actors.preflight.preflight import preflight
from tests.helpers.models.preflight_specs import found, only, spec_of

EXPERTS = 8 * 18432  # of the model of these tests, in float32
PLENTY = 10**12
Machine = Callable[[int, int], None]
TRAIN = {"train": True}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    def has(total: int, free: int) -> None:
        for module in (check_machine, check_training):
            monkeypatch.setattr(module, "machine_memory", lambda: (total, free))

    return has


def trunk_bytes(folder: Path) -> int:
    return preflight(spec_of(folder)).described["m"].trunk_bytes


def of_training(folder: Path, **more: Any) -> list[str]:
    model = {**TRAIN, **more.pop("model", {})}
    spec = spec_of(folder, model=model, **more)
    return [severity for severity, path in found(spec) if path == "models.0.train"]


def test_what_no_optimizer_can_train_is_said(whole: Path, machine: Machine) -> None:
    trunk = trunk_bytes(whole)
    # Experts: two versions, masters, gradients. Trunk: the endpoint's, masters, gradients.
    least = 4 * EXPERTS + 3 * trunk
    machine(least, PLENTY)
    assert of_training(whole) == []
    machine(least - 1, PLENTY)
    assert of_training(whole) == ["warning"]
    assert found(spec_of(whole)) == []
    one = only(spec_of(whole, model=TRAIN))
    assert "whatever the optimizer, and this machine has 0.0 GB" in one.message
    # In half precision: two more bytes for the master.
    machine((2 * 2 + 4 + 4) * EXPERTS // 4 + (2 + 4 + 4) * trunk // 4, PLENTY)
    assert of_training(whole, model={"dtype": "bfloat16"}) == []
    assert of_training(whole) == ["warning"]
    assert of_training(whole, ray={"address": "auto"}) == []


def test_replicas_and_owners_count(whole: Path, machine: Machine) -> None:
    trunk = trunk_bytes(whole)
    hosts = [{"count": 2}]
    for more, least in (
        # Two replicas with their gradients; the owner sums them up.
        ({"model": {"replicas": 2}}, 8 * EXPERTS + 3 * trunk),
        # Two owners; that which serves nothing fetches the gradients.
        ({"balance": {"redundancy": 1}}, 6 * EXPERTS + 5 * trunk),
    ):
        machine(least, PLENTY)
        assert of_training(whole, hosts=hosts, **more) == []
        machine(least - 1, PLENTY)
        assert of_training(whole, hosts=hosts, **more) == ["warning"]


def test_what_is_not_free_for_adamw_is_a_warning(whole: Path, machine: Machine) -> None:
    described = preflight(spec_of(whole)).described["m"]
    spec = spec_of(whole, model=TRAIN)
    plan = plan_training(spec, spec.models[0], described)
    trunk = described.trunk_bytes
    assert plan.weights == EXPERTS
    assert plan.masters == EXPERTS + trunk
    assert 2 * plan.masters <= plan.state <= 2 * plan.masters + 16
    assert plan.passing == EXPERTS + trunk
    # A process for each host, the endpoint's trunk, and the one that trains, with its gradients.
    processes = spec.num_hosts + 2
    wanted = plan.peak + 3 * trunk + processes * check_training.HOST_BYTES
    wanted += spec.num_hosts * check_training.BESIDES_TENSORS_BYTES
    machine(PLENTY, wanted)
    assert found(spec) == []
    machine(PLENTY, wanted - 1)
    one = only(spec)
    assert (one.severity, one.path) == ("warning", "models.0.train")
    assert "to train all of 'm' with AdamW takes" in one.message


def test_weights_that_do_not_fit_are_one_error(whole: Path, machine: Machine) -> None:
    machine(EXPERTS - 1, 0)
    assert found(spec_of(whole, model=TRAIN)) == [("error", "hosts")]
