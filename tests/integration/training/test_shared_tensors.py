"""A norm that the experts of a layer share: its gradient, its steps, and where it is kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesaic.actors.training.optimizer import RunOptimizer
from moesaic.cluster.expert_keys import SHARED, TRUNK, ExpertKey
from moesaic.models.training.trainable_trunk import trainable_trunk_of
from moesaic.proto.errors import StepLost
from tests.helpers.models.normed import NORM, saved_normed
from tests.helpers.models.versions import newest_transformers
from tests.helpers.training.runs import optimizing, training_pool
from tests.helpers.training.trunks import (
    IDS,
    assert_equal,
    assert_near,
    loss_of,
    plain_model,
    training,
)
from tests.helpers.training.whole_steps import (
    assert_same_model,
    one_step,
    plain_run,
    states,
    stepped_as_plain,
)

F64 = torch.float64
pytestmark = newest_transformers  # older ones have no post-expert norm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_normed(tmp_path_factory.mktemp("normed"))


@pytest.mark.parametrize(
    ("hosts", "replicas", "exact", "borrows"),
    [(1, 1, False, True), (2, 1, True, False), (3, 2, False, False), (3, 2, False, True)],
)
def test_its_gradient_is_summed_over_all_experts_and_hosts(
    folder: Path, hosts: int, replicas: int, exact: bool, borrows: bool
) -> None:
    plain = plain_model(folder, F64)
    with training(folder, hosts=hosts, replicas=replicas, exact=exact, borrows=borrows) as trunk:
        trunk.begin(exact=exact)
        for ids in (IDS, IDS[:1, 2:]):
            loss_of(plain, ids).backward()
            loss_of(trunk.model, ids).backward()
        found = trunk.gradients(here=borrows and not exact)
        assert {layer for _, layer, expert in found if expert == SHARED} == {0, 1}
        assert_equal(trunk, found, plain, folder, 1e-12)


@pytest.mark.parametrize(
    ("hosts", "replicas", "redundancy", "borrows"),
    [(1, 1, 0, False), (2, 1, 0, True), (3, 2, 0, False), (3, 2, 1, True)],
)
def test_steps_are_those_of_the_plain_model(
    folder: Path, hosts: int, replicas: int, redundancy: int, borrows: bool
) -> None:
    """Clipping, weight decay and moments are over it, too; all replicas have its new version."""
    with stepped_as_plain(folder, hosts, replicas, redundancy, borrows=borrows) as (
        pool,
        optimizer,
    ):
        owners = owners_of(optimizer)
        for key, own in owners.items():
            if key.layer != TRUNK and key.expert != SHARED:
                assert set(own) <= set(owners[key._replace(expert=SHARED)])
        states(optimizer, pool)  # all owners have the same bits


def owners_of(optimizer: RunOptimizer) -> dict[ExpertKey, tuple[str, ...]]:
    run: Any = optimizer.run
    return dict(run.lead.steps.owners)


@pytest.mark.parametrize(
    ("what", "borrows"),
    [("norm", False), ("experts", True), ("a layer", False), ("all experts", True)],
)
def test_what_is_frozen_stays_and_the_rest_learns(folder: Path, what: str, borrows: bool) -> None:
    """Frozen experts have to be in the version of each step, too."""
    frozen = {
        "norm": ("post_expert_norm",),
        "experts": ("gate_up_proj", "down_proj"),
        "a layer": ("layers.0.mlp.experts",),
        "all experts": ("experts",),
    }[what]
    plain = plain_model(folder, F64)
    start = copy.deepcopy(plain)

    def freeze(model: Any) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in frozen))

    freeze(plain)
    optimizer = torch.optim.AdamW(
        [one for one in plain.parameters() if one.requires_grad],
        lr=1e-2,
        weight_decay=0.1,
        fused=True,
    )
    expected = [one_step(plain, optimizer, step) for step in range(2)]
    with (
        training_pool(folder, hosts=2, replicas=2, borrows=borrows) as pool,
        optimizing(pool, folder, borrows=borrows, prepare=freeze) as (model, mine),
    ):
        found = [one_step(model, mine, step) for step in range(2)]
        assert torch.tensor(found).sub(torch.tensor(expected)).abs().max() < 1e-12
        assert_same_model(pool, model, plain, 1e-12)
    unchanged = plain.get_parameter(NORM.format(0)).equal(start.get_parameter(NORM.format(0)))
    assert unchanged == (what != "experts")


def test_it_can_have_a_group_of_its_own(folder: Path) -> None:
    def groups(model: Any) -> list[dict[str, Any]]:
        norms = [one for name, one in model.named_parameters() if "post_expert_norm" in name]
        others = [one for name, one in model.named_parameters() if "post_expert_norm" not in name]
        return [{"params": others}, {"params": norms, "lr": 3e-2, "weight_decay": 0.0}]

    plain = plain_model(folder, F64)
    optimizer = torch.optim.AdamW(groups(plain), lr=1e-2, weight_decay=0.1, fused=True)
    expected = [one_step(plain, optimizer, step) for step in range(2)]
    with (
        training_pool(folder, hosts=2) as pool,
        optimizing(pool, folder, params=groups) as (model, mine),
    ):
        stand_ins = [one for one in trainable_trunk_of(model).stand_ins if one.name == "norm"]
        assert [one.target for one in stand_ins] == [NORM.format(layer) for layer in range(2)]
        found = [one_step(model, mine, step) for step in range(2)]
        assert torch.tensor(found).sub(torch.tensor(expected)).abs().max() < 1e-12
        assert_same_model(pool, model, plain, 1e-12)


def test_a_checkpoint_has_it(folder: Path, tmp_path: Path) -> None:
    plain, expected = plain_run(folder, 3)
    with (
        training_pool(folder, hosts=3, replicas=2) as pool,
        optimizing(pool, folder, redundancy=1) as (model, optimizer),
    ):
        for step in range(2):
            one_step(model, optimizer, step)
        model.save_pretrained(tmp_path / "saved")
        kept = optimizer.state_dict()
        before = states(optimizer, pool)
    with (
        training_pool(folder, hosts=2) as pool,
        optimizing(pool, folder, run=9) as (model, optimizer),
    ):
        one_step(model, optimizer, 7)  # it is forgotten
        optimizer.load_state_dict(kept)
        after = states(optimizer, pool)
        assert before.keys() == after.keys()
        for key, tensors in before.items():
            assert all(torch.equal(after[key][name], one) for name, one in tensors.items())
        found = one_step(model, optimizer, 2)
        assert torch.tensor(found).sub(torch.tensor(expected[2])).abs().max() < 1e-12
        assert_same_model(pool, model, plain, 1e-12)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=F64)
    reference, _ = plain_run(folder, 2)
    for name, wanted in reference.named_parameters():
        assert_near(again.get_parameter(name).detach(), wanted.detach(), 1e-12, name)


def test_a_checkpoint_of_a_run_with_frozen_experts(folder: Path, tmp_path: Path) -> None:
    def freeze(model: Any) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.0.mlp.experts" not in name)

    with (
        training_pool(folder, hosts=2, replicas=2) as pool,
        optimizing(pool, folder, prepare=freeze) as (model, optimizer),
    ):
        one_step(model, optimizer, 0)
        optimizer.save(tmp_path / "saved")
        kept, before = optimizer.state_dict(), states(optimizer, pool)
        first = one_step(model, optimizer, 1)
        optimizer.load_state_dict(kept)
        assert before.keys() == states(optimizer, pool).keys()
        assert first == one_step(model, optimizer, 1)


@pytest.mark.parametrize("how", ["drained", "lost"])
def test_its_owners_follow_those_of_the_experts(folder: Path, how: str) -> None:
    plain, expected = plain_run(folder, 3)
    with (
        training_pool(folder, hosts=3, replicas=2) as pool,
        optimizing(pool, folder, redundancy=1) as (model, optimizer),
    ):
        found = [one_step(model, optimizer, 0)]
        if how == "drained":
            pool.leaving.add("host-1")
        else:
            pool.lose("host-1")
            with pytest.raises(StepLost):
                one_step(model, optimizer, 1)
            optimizer.zero_grad()
        run: Any = optimizer.run
        run.lead.driver.look()
        assert all("host-1" not in hosts for hosts in owners_of(optimizer).values())
        found += [one_step(model, optimizer, step) for step in (1, 2)]
        assert torch.tensor(found).sub(torch.tensor(expected)).abs().max() < 1e-12
        assert_same_model(pool, model, plain, 1e-12)
        states(optimizer, pool)
