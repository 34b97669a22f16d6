"""`moesaic train` over a cluster on Ray, while workers, hosts and the run are killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from moesaic.actors.training.command.run_folder import RunFolder
from moesaic.cluster.train_command.records import history
from moesaic.handle import Cluster
from moesaic.models.data.dealt import Dealt
from moesaic.models.data.sequences import sequence
from moesaic.models.data.token_file import TokenFile
from moesaic.proto.errors import MoesaicError
from tests.helpers.documented import json_keys
from tests.helpers.processes.live import ON_RAY, running, wait_until
from tests.helpers.training.train_on_ray import (
    Run,
    assert_same,
    fork,
    kill_host,
    kill_run,
    kill_worker,
    nothing_trains,
    spec_of,
    write_texts,
)
from tests.integration.conftest import save_model

pytestmark = ON_RAY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "mixtral")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), 3, 150)


@pytest.fixture(scope="module")
def pool(folder: Path) -> Iterator[Cluster]:
    model = {"name": "m", "path": str(folder), "replicas": 2, "train": True}
    groups = [{"count": 3, "min_count": 2, "max_count": 4}]
    settings: dict[str, Any] = {"endpoint": None, "monitoring": None}
    with running("train", folder, hosts=groups, models=[model], **settings) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(pool: Cluster, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of one worker, with a checkpoint after each third step."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    keep = {"folder": str(folder), "every_steps": 3, "keep": 9}
    run = Run(pool, spec_of(pool, texts, folder, workers={"num_cpus": 0}, checkpoints=keep))
    report = run.train()
    assert (report.steps, report.wanted_steps) == (12, 12)
    return run


def test_a_checkpoint_is_a_model_of_transformers(undisturbed: Run) -> None:
    """It has the perplexity that the run has found."""
    folder = RunFolder(Path(undisturbed.spec.checkpoints.folder))
    newest = folder.newest()
    assert newest is not None and newest.step == 12
    model = AutoModelForCausalLM.from_pretrained(newest.path)
    _, (*_, last) = history(folder.records()[0])
    data, evaluation = undisturbed.spec.data, undisturbed.spec.evaluation
    assert evaluation is not None
    with TokenFile(folder.tokens) as tokens, torch.no_grad():
        dealt = Dealt(tokens, length=16, per_step=4, held_out=data.held_out, seed=data.seed)
        chosen = dealt.held_out[: evaluation.sequences]
        rows = [sequence(tokens, number, 16)[0] for number in chosen]
        loss = float(model(input_ids=torch.stack(rows), labels=torch.stack(rows)).loss)
    assert abs(loss - last.held_out_loss) < 1e-5


def test_workers_a_host_and_the_run_are_killed_and_no_loss_differs(
    pool: Cluster, texts: Path, undisturbed: Run, tmp_path: Path
) -> None:
    target = fork(undisturbed, 3, tmp_path / "run")
    pids: list[int] = []
    deeds = {
        4: kill_worker(1),
        6: kill_run,
        8: kill_host("host-1"),
        10: kill_worker(1),
        11: lambda run: pids.append(run.pid_of_worker(0)),
    }
    run = Run(pool, spec_of(pool, texts, target), deeds)
    run.train(resume=True)
    assert_same(run, undisturbed)
    assert pids == [run.first_pids[0]], "the surviving worker kept its process"
    assert sum("another one takes its place" in line for line in run.said) == 2
    wait_until(lambda: nothing_trains(pool))


def test_state_that_is_lost_takes_the_run_back_by_itself(
    pool: Cluster, texts: Path, undisturbed: Run, tmp_path: Path
) -> None:
    target = fork(undisturbed, 3, tmp_path / "run")
    changes = {
        "optimizer": {**spec_of(pool, texts, target).optimizer.model_dump(), "redundancy": 0}
    }
    run = Run(pool, spec_of(pool, texts, target, **changes), {8: kill_host("host-0")})
    report = run.train(resume=True)
    assert report.steps == 12
    assert_same(run, undisturbed)
    assert any("gone back to its checkpoint after step 6" in line for line in run.said), run.said


def test_ctrl_c_saves_and_resume_goes_on(
    pool: Cluster, texts: Path, undisturbed: Run, tmp_path: Path
) -> None:
    target = fork(undisturbed, 3, tmp_path / "run")
    spec = tmp_path / "train.yaml"
    spec.write_text(yaml.safe_dump(spec_of(pool, texts, target).model_dump(mode="json")))
    command = [sys.executable, "-m", "moesaic.cli.main", "train", str(spec), "--resume", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        try:
            lines = iter(process.stderr)
            assert any(line.startswith("step ") for line in lines)
            process.send_signal(signal.SIGINT)
            rest = list(lines)
            report = json.loads(process.stdout.read())
            assert process.wait(60) == 130  # steps are left
        finally:
            process.kill()
    assert any("ends after the step under way" in line for line in rest), rest
    assert report.keys() == json_keys()["train"]
    assert 3 < report["steps"] < 12
    assert report["checkpoint"].endswith(f"step-{report['steps']:08d}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 12
    run = Run(pool, spec_of(pool, texts, target))
    assert_same(run, undisturbed)


def test_what_cannot_begin_is_said_and_nothing_starts(
    pool: Cluster, texts: Path, undisturbed: Run, tmp_path: Path
) -> None:
    begun = Path(undisturbed.spec.checkpoints.folder)
    settings = undisturbed.spec.optimizer.model_dump()
    for changes, message in [
        ({"checkpoints": {"folder": str(begun)}}, "it has a run already"),
        ({"model": "x"}, "'x' is not one of the cluster's models"),
        ({"optimizer": {**settings, "name": "Adamw"}}, "optimizer: .*Adamw"),
        ({"optimizer": {**settings, "settings": {"rl": 1}}}, "optimizer: .*rl"),
        ({"data": {"path": str(tmp_path / "none")}}, "none"),
        ({"data": {"path": str(texts), "sequence_length": 100_000}}, "shorter sequence_length"),
        ({"data": {"path": str(texts), "held_out": 0}}, "no sequences are held out"),
    ]:
        run = Run(pool, spec_of(pool, texts, tmp_path / "run", **changes))
        with pytest.raises(MoesaicError, match=message):
            run.train()
        assert run.crew is None
    with pytest.raises(MoesaicError, match="it has no run to resume"):
        Run(pool, spec_of(pool, texts, tmp_path / "run")).train(resume=True)
    assert nothing_trains(pool)
    assert not (tmp_path / "run" / "run.json").exists()
