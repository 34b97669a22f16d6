"""What goes wrong with workers, or between them, is told to all, and a run goes on after it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.actors.training.lead import coordinator as coordinator_module
from moesaic.actors.training.lead.coordinator import Coordinator
from moesaic.actors.training.optimizer import RunOptimizer
from moesaic.cluster.expert_keys import TRUNK
from moesaic.cluster.training.orders import Begin, Commit, Order, Own
from moesaic.cluster.training.workers import Worker, Workers
from moesaic.proto.errors import (
    BadInput,
    ClusterError,
    MoesaicError,
    StepLost,
    Superseded,
)
from tests.helpers.training.crews import (
    WAIT_S,
    Crew,
    backward,
    crew,
    error_of,
    microbatches,
    step,
    until,
)
from tests.helpers.training.runs import LocalPool
from tests.integration.conftest import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "mixtral")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A worker that waits for nothing is told so after some seconds, and not after an hour."""
    monkeypatch.setattr(coordinator_module, "MEET_S", 8.0)
    yield
    assert torch.get_default_dtype() == torch.float32, "models were built in several threads"


def test_a_forward_pass_does_not_change_which_part_of_the_step_is_this_workers(
    folder: Path,
) -> None:
    """It begins another attempt by itself, with other workers: half of the step is applied."""
    with crew(folder) as team:
        team.begin("a", "b")
        # The next attempt is lost from its beginning.
        team.pool.gate = lambda host, order: not (isinstance(order, Begin) and host == "host-1")
        team.each(step)
        team.pool.gate = lambda host, order: True
        team.lead._workers.least = 1  # so that one is enough from now on, as in a run meant for 1

        def goes_on(model: Any, optimizer: RunOptimizer) -> tuple[int, int]:
            run: Any = optimizer.run
            before = run.workers
            own = microbatches(run.step)[run.number :: run.workers]  # as `one_step` does
            left.wait(WAIT_S)
            try:
                _, count = backward(model, own)
                optimizer.step(weight=count)
            except StepLost:
                return 0, 0
            return before, run.workers

        left = threading.Event()
        went = team.do("a", goes_on)
        team.do("b", lambda _, o: o.close()).result(WAIT_S)
        left.set()
        before, after = went.result(WAIT_S)
        assert before == after, "it has computed its part of two, and was alone"


def test_nobody_begins_before_the_first_worker(folder: Path) -> None:
    """It has put the weights of the first attempt, and would take them for later ones."""
    with crew(folder, 1) as team:
        done, owned = threading.Event(), threading.Event()
        inner = Coordinator.again

        def again(self: Coordinator, worker: Worker) -> Any:
            if worker.name == "a":
                owned.set()
                assert done.wait(WAIT_S)
            return inner(self, worker)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Coordinator, "again", again)
            first = team.join("a")
            assert owned.wait(WAIT_S)
            second = team.join("b")
            until(lambda: team.lead.workers == 2)
            assert not second.done()
            done.set()
            first.result(WAIT_S)
            second.result(WAIT_S)
        team.each(step)
        other = dict(team.models["b"].named_parameters())
        for name, parameter in team.models["a"].named_parameters():
            assert parameter.equal(other[name]), name


def test_a_worker_without_a_microbatch_learns_in_total_that_the_attempt_is_over(
    folder: Path,
) -> None:
    """`total` raises StepLost, `zero_grad` does nothing, and the worker never comes back."""
    with crew(folder) as team:
        team.begin("a", "b")

        def idle(_: Any, optimizer: RunOptimizer) -> bool:
            run: Any = optimizer.run
            with pytest.raises(StepLost):
                run.total("loss", (0.0, 0))
            optimizer.zero_grad()
            try:
                run.total("loss", (0.0, 0))
            except StepLost as error:
                return "is over" not in str(error) and "begun anew" not in str(error)
            return True

        def drops(model: Any, optimizer: RunOptimizer) -> None:
            backward(model, microbatches(0)[:1])
            optimizer.zero_grad()
            optimizer.run.total("loss", (0.0, 0))

        first = team.do("b", drops)
        second = team.do("a", idle)
        assert second.result(WAIT_S), "it is still in the attempt that is over"
        first.result(WAIT_S)


def test_a_worker_that_remains_takes_over_a_whole_checkpoint(folder: Path, tmp_path: Path) -> None:
    """It puts the part of it that was its own before the others left."""
    with crew(folder) as team:
        team.begin("a", "b")
        team.each(step)
        team.do("a", lambda _, o: o.save(tmp_path / "saved")).result(WAIT_S)
        kept = team.optimizers["a"].state_dict()
        team.each(step)
        team.do("b", lambda _, o: o.close()).result(WAIT_S)
        failed = error_of(team.do("a", lambda _, o: o.load_state_dict(kept)))
        assert failed is None


@pytest.mark.parametrize("workers", [1, 2])
def test_a_checkpoint_is_taken_over_again_after_an_error(
    folder: Path, tmp_path: Path, workers: int
) -> None:
    """The results of the first `forget` and `take_over` are handed out the second time."""
    with crew(folder, workers) as team:
        team.begin(*["a", "b"][:workers])
        team.each(step)
        kept = [o.state_dict() for o in team.optimizers.values()]
        team.do("a", lambda _, o: o.save(tmp_path / "saved")).result(WAIT_S)
        kept = team.optimizers["a"].state_dict()
        team.each(step)
        team.pool.gate = lambda host, order: not (isinstance(order, Own) and host == "host-1")

        def restore(_: Any, optimizer: RunOptimizer) -> None:
            optimizer.load_state_dict(kept)

        def fails(_: Any, optimizer: RunOptimizer) -> None:
            with pytest.raises(ClusterError):
                optimizer.load_state_dict(kept)

        team.each(fails)
        team.pool.gate = lambda host, order: True
        team.each(restore)
        assert [o.run.step for o in team.optimizers.values()] == [1] * workers


def test_the_first_worker_is_gone_before_the_weights_are_there(folder: Path) -> None:
    """The others get an error instead of waiting for its weights."""
    with crew(folder, 1) as team:
        team.begin("x")  # for its coordinator's plan and pool
        lead = team.lead
        now = [0.0]
        other = Coordinator(
            team.pool,
            _steps_of(lead, team.pool, 2),
            workers=Workers(2),
            clock=lambda: now[0],
        )
        first, second = Worker("a", 1), Worker("b", 2)
        with ThreadPoolExecutor(1) as threads:
            assert other.enter(first) is not None
            other.hear(first)
            assert other.enter(second) is None
            waits = threads.submit(other.again, second)
            until(lambda: other._workers._known["b"].waits)
            now[0] = 100.0  # the first one was killed; the other one is heard
            other.hear(second)
            other._look()
            error = error_of(waits)
            other.driver.stop()
        assert error is not None
        assert "a is gone before it had begun" in str(error)


def test_the_first_worker_fails_to_put_the_weights_and_the_others_hear_of_it(
    folder: Path,
) -> None:
    """It leaves before it has put them."""
    with crew(folder, 1) as team:
        team.begin("x")
        other = Coordinator(
            team.pool, _steps_of(team.lead, team.pool, 2), workers=Workers(2, lease_s=math.inf)
        )
        first, second = Worker("a", 1), Worker("b", 2)
        with ThreadPoolExecutor(1) as threads:
            assert other.enter(first) is not None
            waits = threads.submit(other.again, second)
            until(lambda: other._workers._known["b"].waits)
            other.leave(first)  # as `PoolRun.close` does after an error
            error = error_of(waits)
            other.driver.stop()
        assert error is not None
        assert "did not come within" not in str(error)


def test_a_worker_that_may_not_take_part_does_not_end_the_run(folder: Path) -> None:
    """It leaves what it never took part in, as the first one puts the weights."""
    with crew(folder, 1) as team:
        team.begin("x")
        other = Coordinator(
            team.pool, _steps_of(team.lead, team.pool, 2), workers=Workers(2, lease_s=math.inf)
        )
        assert other.enter(Worker("a", 1)) is not None
        other.leave(Worker("b", 2))  # its digest was refused, so it closes
        other.driver.stop()
        assert not other.is_over


def _steps_of(lead: Coordinator, pool: LocalPool, run: int) -> Any:
    from dataclasses import replace

    from moesaic.cluster.training.steps import TrainingSteps

    versions = pool.hosts.placement.versions
    plan = replace(lead.plan, run=run)
    return TrainingSteps(plan, pool.now(), versions=versions, next_version=100)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan])
def test_a_weight_that_cannot_be_used_is_refused(folder: Path, weight: float) -> None:
    """-1 breaks the run: hosts refuse the coefficient, and count as lost with all state."""
    with crew(folder, 1) as team:
        team.begin("a")

        def bad(model: Any, optimizer: RunOptimizer) -> BaseException | None:
            backward(model, microbatches(0))
            try:
                optimizer.step(weight=weight)
            except BaseException as error:
                return error
            return None

        error = team.do("a", bad).result(WAIT_S)
        assert not team.optimizers["a"].run.is_broken, error
        assert isinstance(error, BadInput), error


def test_a_step_that_is_applied_and_not_served_is_no_lost_step(folder: Path) -> None:
    """`commit` says ClusterError; who gets StepLost does the step a second time."""
    with crew(folder, 1) as team:
        team.begin("a")
        publish = team.pool.publish

        def fails(version: int, timeout_s: float) -> Any:
            raise ClusterError("the controller is restarting")

        team.pool.publish = fails
        error = error_of(team.do("a", step))
        team.pool.publish = publish
        assert team.lead.steps.step == 1, "it was applied"
        assert not isinstance(error, StepLost), error
        assert isinstance(error, ClusterError)


def test_a_worker_that_waits_is_not_expected_at_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    """`gather` counts on one that is in `again`, which waits for the others."""
    with crew(folder) as team:
        team.begin("a", "b")
        team.each(step)
        team.do("a", lambda _, o: o.save(tmp_path / "saved")).result(WAIT_S)
        kept = team.optimizers["a"].state_dict()
        team.each(step)
        late = team.join("c")
        until(lambda: team.lead.workers == 3)
        team.do("b", lambda _, o: o.close()).result(WAIT_S)
        error = error_of(team.do("a", lambda _, o: o.load_state_dict(kept)))
        assert error_of(late) is None, error  # it and the other one wait for each other
        assert error is None


def test_workers_that_wait_hear_that_the_run_is_over(folder: Path) -> None:
    """A newer run rules; the thread that keeps the lease finds out."""
    with crew(folder) as team:
        team.begin("a", "b")
        waits = team.do("a", lambda _, o: o.run.total("x", [1.0]))
        now = team.pool.now

        def superseded(*_: Any, **__: Any) -> Any:
            raise Superseded("a newer run has begun")

        team.pool.now = superseded
        until(lambda: team.lead.is_over)
        error = error_of(waits)
        team.pool.now = now
        assert isinstance(error, Superseded), error


def test_the_lease_is_kept_while_the_next_attempt_begins_without_a_worker(
    folder: Path,
) -> None:
    """`_look` begins it in the keeper's thread: no `now` while a host does not answer."""
    with crew(folder, 1) as team:
        team.begin("x")
        now = [0.0]
        other = Coordinator(
            team.pool,
            _steps_of(team.lead, team.pool, 2),
            workers=Workers(1, lease_s=5.0),
            clock=lambda: now[0],
        )
        slow, asked = threading.Event(), threading.Event()
        first, second = Worker("a", 1), Worker("b", 2)
        renewed: list[float] = []
        inner = team.pool.now

        def counted(*given: Any, **named: Any) -> Any:
            if threading.current_thread() is other.driver._keeper:
                renewed.append(time.monotonic())
            return inner(*given, **named)

        def gate(host: str, order: Order) -> bool:
            if isinstance(order, Begin) and order.attempt.run == 2:
                asked.set()
                slow.wait(20.0)
            return True

        with ThreadPoolExecutor(2) as threads:
            assert other.enter(first) is not None
            for key in [key for key in other.plan.tensors if key.layer == TRUNK]:
                _put(team, key, 2)
            both = [threads.submit(other.again, one) for one in (first, second)]
            until(lambda: other.workers == 2)
            other.own(first)
            for one in both:
                assert one.result(WAIT_S).workers == 2
            again = threads.submit(other.again, first)
            until(lambda: other._workers._known["a"].waits)
            team.pool.gate, team.pool.now = gate, counted
            other._workers.hear(first, 100.0)
            now[0] = 100.0  # the second one is gone, and hosts are slow to begin without it
            assert asked.wait(20.0)
            renewed.clear()
            time.sleep(4.0)  # a lease is 30 s, and an order may take 120
            found = len(renewed)
            slow.set()
            again.result(WAIT_S)
            other.driver.stop()
        assert found >= 2


def _put(team: Crew, key: Any, run: int) -> None:
    from moesaic.actors.transport.bulk.links import BulkLinks
    from moesaic.cluster.training.orders import BulkKey

    model = team.models["x"]
    parameters = dict(model.named_parameters())
    tensors = {n: parameters[n].detach() for n in team.lead.plan.tensors[key].groups}
    links = BulkLinks("here")
    for host in team.pool.alive.values():
        links.put(host.entry(), BulkKey("weights", key, run=run), tensors, timeout_s=30.0)
    links.close()


def test_workers_that_take_over_different_checkpoints_are_told_so(
    folder: Path, tmp_path: Path
) -> None:
    """Otherwise owners would mix the states of two checkpoints."""
    with crew(folder) as team:
        team.begin("a", "b")
        kept = []
        for number in range(2):
            team.each(step)
            saved = tmp_path / str(number)
            team.do("a", lambda _, o, saved=saved: o.save(saved)).result(WAIT_S)
            kept.append(team.optimizers["a"].state_dict())
        team.each(step)
        both = [
            team.do("a", lambda _, o: o.load_state_dict(kept[0])),
            team.do("b", lambda _, o: o.load_state_dict(kept[1])),
        ]
        errors = [error_of(one) for one in both]
        assert any(isinstance(one, MoesaicError) for one in errors), "what is it now?"


def test_an_attempt_does_not_begin_with_fewer_workers_than_the_run_wants(
    folder: Path,
) -> None:
    """One is gone during a commit."""
    with crew(folder) as team:
        team.begin("a", "b")
        gone = threading.Event()
        run: Any = team.optimizers["b"].run
        leaving = run._worker

        def gate(host: str, order: Order) -> bool:
            if isinstance(order, Commit) and not gone.is_set():
                gone.set()
                team.lead._workers.leave(leaving)  # as `expire` does
            return True

        team.pool.gate = gate
        for one in [team.do(name, step) for name in ("a", "b")]:
            error_of(one)
        run = team.optimizers["a"].run
        stand = run._stand
        assert stand.workers >= 2 or stand.lost, stand


def test_a_total_is_not_that_of_another_question(folder: Path) -> None:
    with crew(folder, 1) as team:
        team.begin("a")
        run: Any = team.optimizers["a"].run
        assert run.total("loss", [1.0]) == [1.0]
        try:
            assert run.total("loss", [2.0]) == [2.0]
        except MoesaicError:
            pass  # it may as well be refused


def test_numbers_of_different_lengths_are_refused(folder: Path) -> None:
    with crew(folder) as team:
        team.begin("a", "b")

        def act(_: Any, optimizer: RunOptimizer) -> None:
            run: Any = optimizer.run
            run.total("loss", [1.0] * (1 + run.number))

        for one in [team.do(name, act) for name in ("a", "b")]:
            assert isinstance(error_of(one), MoesaicError)


def test_a_checkpoint_is_written_after_the_coordinator_was_replaced(
    folder: Path, tmp_path: Path
) -> None:
    """The worker still names the run of before."""
    with crew(folder, 1) as team:
        team.begin("a")
        team.each(step)
        run: Any = team.optimizers["a"].run
        heir = Coordinator(
            team.pool,
            _steps_of(team.lead, team.pool, 2),
            workers=Workers(1, lease_s=math.inf),
            since=1,
        )
        heir.go_on()
        old, run._lead = run._lead, heir
        old.driver.stop()
        team.do("a", lambda _, o: o.save(tmp_path / "saved")).result(WAIT_S)
