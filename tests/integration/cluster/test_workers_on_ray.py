"""Several processes train one model of a cluster on Ray: they come, go and are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.actors.runtime.ray_border import namespace_of
from moesaic.handle import Cluster
from tests.helpers.paths import ROOT
from tests.helpers.processes.live import ON_RAY, processes_of, running, wait_until
from tests.helpers.training.crews import MAX_NORM, one_step, plain_losses
from tests.integration.conftest import save_model

pytestmark = ON_RAY

STEPS = 6
SCRIPT = """
import sys
from tests.integration.cluster.test_workers_on_ray import work
work(*sys.argv[1:])
"""


def work(name: str, trained: str, *succeeds: str) -> None:
    """One of the workers: print the number of each step and its loss."""
    cluster = moesaic.connect(name)
    model = cluster.from_pretrained(trained, train=True)
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "max_grad_norm": MAX_NORM}
    with moesaic.PoolOptimizer(
        model, cluster, redundancy=1, succeed=bool(succeeds), **options
    ) as optimizer:
        run: Any = optimizer.run
        while run.step < STEPS:
            loss = one_step(model, optimizer)
            print(run.step, loss, flush=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "mixtral")


@pytest.fixture
def pool(folder: Path) -> Iterator[Cluster]:
    model = {"name": "m", "path": str(folder), "replicas": 2, "train": True}
    with running("workers", folder, hosts=[{"count": 3}], models=[model]) as cluster:
        yield cluster


@contextmanager
def worker(
    pool: Cluster, rank: int, *succeeds: str, workers: int = 2, trained: str = "m"
) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(workers)}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, pool.name, trained, *succeeds],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def losses(process: subprocess.Popen[str], found: dict[int, float], count: int = 0) -> None:
    """Read the losses of so many steps; 0: of all that are left."""
    assert process.stdout is not None
    for line in process.stdout:
        if "(raylet)" in line:
            continue  # Ray tells the process that began an actor of its death
        step, loss = line.split()
        assert abs(found.setdefault(int(step), float(loss)) - float(loss)) < 1e-6
        count -= 1
        if not count:
            return


def expected(folder: Path) -> list[float]:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    adam = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.1)
    return plain_losses(plain, adam, STEPS)


def run_actors(pool: Cluster) -> list[str]:
    known: Any = ray.util.list_named_actors(all_namespaces=True)
    own = namespace_of(pool.name)
    return [one["name"] for one in known if one["namespace"] == own and "run-" in one["name"]]


def pid_of_run(pool: Cluster) -> int:
    (name,) = run_actors(pool)
    actor: Any = ray.get_actor(name, namespace=namespace_of(pool.name))
    return ray.get(actor.pid.remote(), timeout=30.0)


def test_workers_and_the_run_are_killed_and_no_loss_differs(pool: Cluster, folder: Path) -> None:
    found: dict[int, float] = {}
    with ExitStack() as stack:
        first = stack.enter_context(worker(pool, 0))
        second = stack.enter_context(worker(pool, 1))
        losses(first, found, 1)
        second.kill()
        third = stack.enter_context(worker(pool, 1, "succeeds"))
        losses(first, found, 1)
        os.kill(pid_of_run(pool), signal.SIGKILL)
        losses(first, found)
        losses(third, found)
        assert first.wait(60) == third.wait(60) == 0
    wanted = expected(folder)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert (
        torch.tensor([found[step + 1] for step in range(STEPS)])
        .sub(torch.tensor(wanted))
        .abs()
        .max()
        < 1e-5
    )
    wait_until(lambda: pool.status().training is None)
    wait_until(lambda: not run_actors(pool))


@pytest.mark.timeout(560)
def test_with_exact_neither_workers_nor_kills_change_a_bit_of_the_losses(folder: Path) -> None:
    """The spec says so, and not the optimizer. Here each process has its memory and its threads."""
    both = {"path": str(folder), "replicas": 2, "train": True, "exact": True}
    spec: dict[str, Any] = {
        "models": [{"name": name, **both} for name in ("m", "other")],
        "hosts": [{"count": 3}],
        "endpoint": None,
    }
    alone: dict[int, float] = {}
    found: dict[int, float] = {}
    with running("exact", folder, **spec) as pool, ExitStack() as stack:
        with worker(pool, 0, workers=1, trained="other") as only:
            losses(only, alone)
            assert only.wait(60) == 0
        first, second = (stack.enter_context(worker(pool, rank)) for rank in range(2))
        losses(first, found, 1)
        os.kill(processes_of(pool)["host-1"].pid, signal.SIGKILL)
        losses(first, found, 1)
        second.kill()
        third = stack.enter_context(worker(pool, 1, "succeeds"))
        losses(first, found, 1)
        os.kill(pid_of_run(pool), signal.SIGKILL)
        losses(first, found)
        assert first.wait(60) == third.wait(60) == 0
    assert sorted(found) == list(range(1, STEPS + 1))
    assert found == alone
