"""The process of a run is gone at some moment, and another one goes on over the same hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.cluster.training.orders import (
    Begin,
    Commit,
    Disown,
    Finish,
    Gather,
    Order,
    Own,
    Reduce,
    Renew,
    Serve,
)
from moesaic.proto.errors import ClusterError, StepLost, Superseded
from tests.helpers.training.runs import LocalPool, optimizing, training_pool
from tests.helpers.training.trunks import loss_of, saved
from tests.helpers.training.whole_steps import (
    assert_same_model,
    microbatches,
    one_step,
    plain_run,
    states,
)


class Killed(BaseException):
    """The process is gone."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("mixtral"), "mixtral")


def killing(pool: LocalPool, kind: type[Order], sent: int) -> None:
    """Kill the process when it is about to send one more order of a kind, after so many."""
    left = [sent]

    def gate(host: str, order: Order) -> bool:
        if isinstance(order, kind):
            left[0] -= 1
        if left[0] < 0:
            raise Killed  # whatever it would send from now on
        return True

    pool.gate = gate


def unharmed(pool: LocalPool) -> None:
    pool.gate = lambda host, order: True


# The order before which the process is gone, how many were sent before it, and the steps that are
# done then. There are three hosts.
MOMENTS: list[tuple[Any, int, int]] = [
    (Gather, 1, 1),
    (Reduce, 2, 1),
    (Reduce, 5, 1),  # all owners but one are prepared
    (Commit, 0, 1),
    (Commit, 1, 2),
    (Commit, 2, 2),
    (Begin, 1, 2),  # of the step that follows
]


@pytest.mark.parametrize(
    ("kind", "sent", "steps", "redundancy"),
    # Without redundancy one of two replicas is no owner, and is told to renew.
    [(*moment, redundancy) for moment in MOMENTS for redundancy in (0, 1)] + [(Renew, 0, 2, 0)],
)
def test_a_process_that_is_gone_at_any_moment_costs_at_most_the_step(
    folder: Path, kind: type[Order], sent: int, steps: int, redundancy: int
) -> None:
    plain, expected = plain_run(folder, 4)
    with (
        training_pool(folder, hosts=3, replicas=2) as pool,
        optimizing(pool, folder, redundancy=redundancy) as (model, optimizer),
    ):
        one_step(model, optimizer, 0)
        killing(pool, kind, sent)
        with pytest.raises(Killed):
            one_step(model, optimizer, 1)
        unharmed(pool)
        with optimizing(pool, folder, redundancy=redundancy, run=2, since=1) as (later, heir):
            assert heir.run.step == steps
            found = [one_step(later, heir, step) for step in range(steps, 4)]
            assert torch.tensor(found).sub(torch.tensor(expected[steps:])).abs().max() < 1e-12
            assert_same_model(pool, later, plain, 1e-12)
            # The one that was taken for dead can do nothing.
            with pytest.raises((Superseded, StepLost, ClusterError)):
                optimizer.zero_grad()
                one_step(model, optimizer, 1)
            assert_same_model(pool, later, plain, 1e-12)
    assert all(host.report().owned == 0 for host in pool.hosts.hosts)


def test_what_a_zombie_sends_reaches_no_gradient(folder: Path) -> None:
    plain, _ = plain_run(folder, 1)
    with (
        training_pool(folder, hosts=2) as pool,
        optimizing(pool, folder) as (model, _),
        optimizing(pool, folder, run=2, since=1) as (later, heir),
    ):
        first, second = microbatches(0)
        loss = loss_of(model, first)
        (loss_of(later, first) / 2).backward()
        with pytest.raises(StepLost, match="attempt 1 at step 0 of run 2 is under way"):
            loss.backward()
        (loss_of(later, second) / 2).backward()
        torch.nn.utils.clip_grad_norm_(later.parameters(), 0.5)
        heir.step()
        assert_same_model(pool, later, plain, 1e-12)


def test_a_second_successor_follows_the_first(folder: Path) -> None:
    plain, _ = plain_run(folder, 2)
    with (
        training_pool(folder, hosts=3, replicas=2) as pool,
        optimizing(pool, folder) as (model, optimizer),
    ):
        one_step(model, optimizer, 0)
        killing(pool, Commit, 1)
        with pytest.raises(Killed):
            one_step(model, optimizer, 1)
        killing(pool, Finish, 1)
        with (
            pytest.raises(Killed),
            optimizing(pool, folder, run=2, since=1),
        ):
            raise AssertionError("it is not reached")
        unharmed(pool)
        with optimizing(pool, folder, run=5, since=1) as (later, heir):
            assert heir.run.step == 2
            assert_same_model(pool, later, plain, 1e-12)


@pytest.mark.parametrize(("kind", "sent"), [(Disown, 1), (Own, 1), (Serve, 1)])
def test_a_checkpoint_that_was_taken_over_in_part_is_no_state(
    folder: Path, tmp_path: Path, kind: type[Order], sent: int
) -> None:
    with (
        training_pool(folder, hosts=3) as pool,
        optimizing(pool, folder) as (model, optimizer),
    ):
        one_step(model, optimizer, 0)
        optimizer.save(tmp_path / "saved")
        kept, before = optimizer.state_dict(), states(optimizer, pool)
        one_step(model, optimizer, 1)
        killing(pool, kind, sent)
        with pytest.raises(Killed):
            optimizer.load_state_dict(kept)
        unharmed(pool)
        with pytest.raises(ClusterError, match="taken over in part; take it over again"):
            optimizer.run.drop()
        optimizer.load_state_dict(kept)
        after = states(optimizer, pool)
        for key, tensors in before.items():
            assert all(torch.equal(after[key][name], one) for name, one in tensors.items())


def test_a_run_that_has_lost_state_goes_on_from_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    plain, expected = plain_run(folder, 3)
    with (
        training_pool(folder, hosts=3, replicas=2) as pool,
        optimizing(pool, folder) as (model, optimizer),
    ):
        one_step(model, optimizer, 0)
        optimizer.save(tmp_path / "saved")
        kept = optimizer.state_dict()
        one_step(model, optimizer, 1)
        pool.lose("host-1")
        with pytest.raises((StepLost, ClusterError)):
            one_step(model, optimizer, 2)
        with pytest.raises(ClusterError, match="go back to a checkpoint, or train with redundancy"):
            optimizer.run.drop()
        assert optimizer.run.is_broken
        optimizer.load_state_dict(kept)
        assert (optimizer.run.step, optimizer.run.is_broken) == (1, False)
        found = [one_step(model, optimizer, step) for step in range(1, 3)]
        assert torch.tensor(found).sub(torch.tensor(expected[1:])).abs().max() < 1e-12
        assert_same_model(pool, model, plain, 1e-12)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"optimizer": "SGD", "lr": 0.1}, "trains 'm' with AdamW and .*; go on with the same"),
        ({"weight_decay": 0.2}, "go on with the same"),
        (
            {"params": lambda model: model.lm_head.parameters()},
            r"trains \['down', .*\] of expert .*, and this one \[\] in .*; begin with the same par",
        ),
    ],
)
def test_another_optimizer_or_other_parameters_do_not_go_on(
    folder: Path, other: dict[str, Any], message: str
) -> None:
    with (
        training_pool(folder, hosts=2) as pool,
        optimizing(pool, folder) as (model, optimizer),
    ):
        one_step(model, optimizer, 0)
        with (
            pytest.raises(ClusterError, match=message),
            optimizing(pool, folder, run=2, since=1, **other),
        ):
            raise AssertionError("it is not reached")
        with optimizing(pool, folder, run=3, since=1) as (later, heir):
            assert heir.run.step == 1
            one_step(later, heir, 1)
