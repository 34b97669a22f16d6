"""What goes wrong around a run of `moesaic train` costs no record and no step, or is said."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from moesaic.actors.training.command.prepare import check, prepare
from moesaic.actors.training.command.run_folder import RunFolder
from moesaic.actors.training.lead import coordinator as coordinator_module
from moesaic.cluster.placement import ModelRef
from moesaic.cluster.train_command.records import HeldOutRecord, StepRecord
from moesaic.cluster.train_command.train_spec import load_train_spec
from moesaic.proto.errors import ClusterError, HostLost, MoesaicError
from tests.helpers.training.runs import Team, training_pool
from tests.helpers.training.train_runs import Runner, train_spec, write_tokens
from tests.helpers.training.trunks import saved
from tests.integration.conftest import save_model

SEQUENCES = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("mixtral"), "mixtral")


CORPSES: list[Callable[[], None]] = []


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(coordinator_module, "MEET_S", 20.0)
    yield
    # In this process, what was killed has left its memory and its threads.
    while CORPSES:
        CORPSES.pop()()
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    write_tokens(folder.tokens, SEQUENCES)
    return folder


class Killed(BaseException):
    """A worker is gone, as with kill -9: nothing of it goes on."""


def kill(optimizer: Any) -> NoReturn:
    """Let hosts hear nothing more of a worker."""
    run = optimizer.run
    CORPSES.append(run.close)
    run.close = lambda: None
    raise Killed


def killed_after(step: int) -> Callable[[Any, Any], None]:
    """Return what kills a worker right after the commit of a step, before it says anything."""

    def begun(optimizer: Any, _: Any) -> None:
        made = optimizer.step

        def stepping(*given: Any, **named: Any) -> Any:
            found = made(*given, **named)
            if optimizer.run.step == step:
                kill(optimizer)
            return found

        optimizer.step = stepping

    return begun


def steps_of(run: RunFolder) -> list[int]:
    return [one.step for one in run.records()[0] if isinstance(one, StepRecord)]


def test_no_record_is_lost_with_the_only_worker(folder: Path, run: RunFolder) -> None:
    """It is killed after a commit, and before it has written the step's record."""
    spec = train_spec()
    with training_pool(folder, hosts=2, replicas=2) as pool:
        runner = Runner(pool, folder, spec, run)
        with pytest.raises(Killed):
            runner.work(None, "worker-0", begun=killed_after(5))
        runner.work(None, "worker-0", run=2, since=1)
    assert steps_of(run) == list(range(1, 9))


def test_a_run_that_is_over_is_resumed_without_another_record(folder: Path, run: RunFolder) -> None:
    spec = train_spec()
    with training_pool(folder, hosts=2, replicas=2) as pool:
        Runner(pool, folder, spec, run).train(1)
    before = run.records()[0]
    with training_pool(folder, hosts=2, replicas=2) as pool:
        Runner(pool, folder, spec, run).train(1)
    assert run.records()[0] == before


def test_an_evaluation_is_recorded_once(folder: Path, run: RunFolder) -> None:
    """A run that goes on from a checkpoint, after whose step it was evaluated already."""
    spec = train_spec(evaluation={"every_steps": 2, "sequences": 4})
    with training_pool(folder, hosts=2, replicas=2) as pool:
        runner = Runner(pool, folder, spec, run)
        with pytest.raises(Killed):
            runner.work(None, "worker-0", begun=killed_after(5))
    with training_pool(folder, hosts=2, replicas=2) as pool:
        Runner(pool, folder, spec, run).train(1)
    held_out = [one.step for one in run.records()[0] if isinstance(one, HeldOutRecord)]
    assert held_out == [0, 2, 4, 6, 8]


def test_no_record_is_lost_with_the_worker_that_writes_them(folder: Path, run: RunFolder) -> None:
    """The first of two is killed after a commit; the other one knows the step's numbers."""
    spec = train_spec()
    team = Team(2)
    with (
        training_pool(folder, hosts=2, replicas=2) as pool,
        ThreadPoolExecutor(3) as threads,
    ):
        runner = Runner(pool, folder, spec, run)
        first = threads.submit(runner.work, team, "worker-0", begun=killed_after(5))
        second = threads.submit(runner.work, team, "worker-1")
        with pytest.raises(Killed):
            first.result(60)
        third = threads.submit(runner.work, team, "worker-0")
        second.result(60)
        third.result(60)
    assert steps_of(run) == list(range(1, 9))


def test_no_evaluation_is_lost_with_the_worker_that_writes_it(folder: Path, run: RunFolder) -> None:
    """The first of two is killed when both know the sums, and before it has written them."""
    spec = train_spec()
    team = Team(2)

    def begun(optimizer: Any, loop: Any) -> None:
        class Folder(RunFolder):
            def add(self, record: Any) -> None:
                if isinstance(record, HeldOutRecord) and record.step == 3:
                    kill(optimizer)
                super().add(record)

        loop._folder = Folder(run.path)

    with (
        training_pool(folder, hosts=2, replicas=2) as pool,
        ThreadPoolExecutor(3) as threads,
    ):
        runner = Runner(pool, folder, spec, run)
        first = threads.submit(runner.work, team, "worker-0", begun=begun)
        second = threads.submit(runner.work, team, "worker-1")
        with pytest.raises(Killed):
            first.result(60)
        third = threads.submit(runner.work, team, "worker-0")
        second.result(60)
        third.result(60)
    held_out = [one.step for one in run.records()[0] if isinstance(one, HeldOutRecord)]
    assert held_out == [0, 3, 6, 8]


def test_a_run_without_a_checkpoint_is_not_begun_anew_with_other_weights(
    folder: Path, run: RunFolder
) -> None:
    """Its process is killed before the first checkpoint, and the user says --resume.

    The pool then serves the weights of five steps, and their optimizer state is gone.
    """
    spec = train_spec(checkpoints={"every_steps": 100})
    with training_pool(folder, hosts=2, replicas=2) as pool:
        runner = Runner(pool, folder, spec, run)
        with pytest.raises(Killed):
            runner.work(None, "worker-0", begun=killed_after(5))
        first = runner.told()[0][0]
        Runner(pool, folder, spec, run).work(None, "worker-0", run=2)
        again = runner.told()[0][0]
    assert again.step == first.step == 1
    assert again.loss == pytest.approx(first.loss, abs=1e-10)


def test_a_second_loss_while_a_run_goes_back_does_not_end_it(folder: Path, run: RunFolder) -> None:
    spec = train_spec()
    with training_pool(folder, hosts=3, replicas=3) as pool:
        runner = Runner(pool, folder, spec, run)

        def begun(optimizer: Any, loop: Any) -> None:
            step, load, lost = optimizer.step, optimizer.load, []

            def stepping(*given: Any, **named: Any) -> Any:
                if optimizer.run.step == 5 and not lost:
                    lost.append(1)
                    pool.lose("host-1")
                return step(*given, **named)

            def loading(*given: Any) -> Any:
                if len(lost) == 1:
                    lost.append(2)
                    pool.gate = lambda host, order: True
                    take_over = optimizer.run._lead.take_over

                    def taking(*these: Any) -> Any:
                        if len(lost) == 2:
                            lost.append(3)
                            pool.lose("host-2")
                        return take_over(*these)

                    optimizer.run._lead.take_over = taking
                return load(*given)

            optimizer.step, optimizer.load = stepping, loading

        runner.train(1, begun=begun)
        assert [one.step for one in runner.told()[0]] == list(range(1, 9))


def test_checkpoints_of_something_else_are_not_taken_over_in_silence(
    folder: Path, run: RunFolder
) -> None:
    """A folder without run.json, in which are checkpoints: the run would go on from them."""
    spec = train_spec()
    with training_pool(folder, hosts=2, replicas=2) as pool:
        Runner(pool, folder, spec, run).train(1)
    assert not (run.path / "run.json").exists()
    with pytest.raises(MoesaicError):
        RunFolder(run.path).check(spec, resume=False)


def test_numbers_of_yaml_may_have_an_exponent(tmp_path: Path) -> None:
    """YAML 1.1 takes 1e-4 for a text, and people who write it do not."""
    spec = tmp_path / "train.yaml"
    spec.write_text("data: {path: x}\noptimizer: {settings: {lr: 1e-4}}\nbalance_loss: 1e-2\n")
    given = load_train_spec(spec)
    assert given.optimizer.settings["lr"] == 1e-4


def test_tokens_that_the_model_does_not_have_are_found_before_a_worker_starts(
    tmp_path: Path,
) -> None:
    model = tmp_path / "model"
    save_model(model, "mixtral")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 16}))
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog " * 50)
    spec = train_spec(data={"path": str(tmp_path / "a.txt"), "sequence_length": 8})
    ref = ModelRef(name="m", path=str(model), dtype="float32", learns=True)
    with pytest.raises(MoesaicError, match="vocab"):
        check(spec, ref)
        prepare(spec, ref, RunFolder(tmp_path / "run"))


@pytest.mark.parametrize("where", ["afile", "afile/below"])
def test_a_folder_that_cannot_be_written_is_named_with_its_key(tmp_path: Path, where: str) -> None:
    model = tmp_path / "model"
    save_model(model, "mixtral")
    (tmp_path / "afile").write_text("x")
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog " * 50)
    spec = train_spec(data={"path": str(tmp_path / "a.txt"), "sequence_length": 8})
    ref = ModelRef(name="m", path=str(model), dtype="float32", learns=True)
    with pytest.raises(MoesaicError, match=r"checkpoints\.folder"):
        prepare(spec, ref, RunFolder(tmp_path / where))


def test_other_settings_of_the_optimizer_are_refused_where_they_change_its_state(
    folder: Path, run: RunFolder
) -> None:
    """`amsgrad` has a tensor more, which no checkpoint of the run has."""
    spec = train_spec()
    run.begin(spec)
    run._records.touch()
    settings = {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True}
    with pytest.raises(MoesaicError):
        run.check(train_spec(optimizer={"settings": settings}), resume=True)


def test_weights_that_explode_end_the_run_with_a_message_for_its_user(
    folder: Path, run: RunFolder
) -> None:
    """There is no zero_grad() to call, and no key not_finite in the spec."""
    spec = train_spec(schedule={"kind": "constant"})
    with training_pool(folder, hosts=2, replicas=2, dtype=torch.float32) as pool:
        runner = Runner(pool, folder, spec, run)
        with pytest.raises(MoesaicError) as found:
            runner.work(None, "worker-0", lr=1e30, dtype=torch.float32)
    assert "zero_grad" not in str(found.value)
    assert "not_finite" not in str(found.value)


@pytest.mark.parametrize("redundancy", [0, 1])
def test_a_host_that_is_lost_while_a_checkpoint_is_written_does_not_end_the_run(
    folder: Path, run: RunFolder, redundancy: int
) -> None:
    """The checkpoint is not written; the one before is there, or others have all that it needs."""
    spec = train_spec()
    with training_pool(folder, hosts=3, replicas=3) as pool:
        runner = Runner(pool, folder, spec, run)

        def begun(optimizer: Any, loop: Any) -> None:
            save, get, lost = optimizer.save, optimizer.run._links.get, []

            def getting(entry: Any, *given: Any, **named: Any) -> Any:
                if lost and entry.host == "host-1":
                    raise HostLost("host-1 is gone")
                return get(entry, *given, **named)

            def saving(where: Path, **named: Any) -> Any:
                if where.name == "step-00000004" and not lost:
                    lost.append(True)
                    pool.lose("host-1")
                return save(where, **named)

            optimizer.save, optimizer.run._links.get = saving, getting

        runner.work(None, "worker-0", begun=begun, redundancy=redundancy)
    assert [one.step for one in runner.told()[0]] == list(range(1, 9))


def test_a_run_actor_that_is_gone_when_a_checkpoint_begins_does_not_end_the_run(
    folder: Path, run: RunFolder
) -> None:
    """`RemoteCoordinator.where` says ClusterError then, and all meetings say StepLost."""
    spec = train_spec()
    with training_pool(folder, hosts=2, replicas=2) as pool:
        runner = Runner(pool, folder, spec, run)

        def begun(optimizer: Any, loop: Any) -> None:
            save, where, lost = optimizer.save, optimizer.run._lead.where, []

            def gone(*given: Any) -> Any:
                if not lost:
                    lost.append(True)
                    raise ClusterError("run-1: The actor is restarting")
                return where(*given)

            def saving(*given: Any, **named: Any) -> Any:
                optimizer.run._lead.where = gone
                return save(*given, **named)

            optimizer.save = saving

        runner.work(None, "worker-0", begun=begun)
    assert steps_of(run) == list(range(1, 9))
