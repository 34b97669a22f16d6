"""A long run on Ray with kills, joins, leaves, a drain and moves has the undisturbed bits."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moesaic.handle import Cluster
from moesaic.proto.errors import MoesaicError
from tests.helpers.processes.live import ON_RAY, running, wait_until
from tests.helpers.training.train_on_ray import (
    Run,
    kill_host,
    kill_run,
    kill_worker,
    nothing_trains,
    spec_of,
    write_texts,
)
from tests.integration.conftest import save_model

pytestmark = [*ON_RAY, pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 200
SEED = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "mixtral")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), 3, 150)


@pytest.fixture
def pool(folder: Path) -> Iterator[Cluster]:
    model = {"name": "m", "path": str(folder), "replicas": 2, "train": True}
    groups = [{"count": 3, "min_count": 2, "max_count": 4}]
    settings: dict[str, Any] = {"endpoint": None, "monitoring": None}
    with running("kills", folder, hosts=groups, models=[model], **settings) as cluster:
        yield cluster


def soon(deed: Callable[[Run], Any], chance: random.Random) -> Callable[[Run], Any]:
    """Do it somewhere within a step or two."""
    pause_s = chance.uniform(0.0, 0.6)

    def later(run: Run) -> None:
        time.sleep(pause_s)
        deed(run)

    return later


def operated(act: Callable[[Cluster], Any]) -> Callable[[Run], Any]:
    """Do what an operator does, who tries again if the pool is busy with something else."""

    def deed(run: Run) -> None:
        def done() -> bool:
            try:
                act(run.pool)
            except MoesaicError:
                return False
            return True

        wait_until(done)

    return deed


def test_two_hundred_steps_with_kills_joins_leaves_and_moves(
    pool: Cluster, folder: Path, texts: Path, tmp_path: Path
) -> None:
    chance = random.Random(SEED)
    common: dict[str, Any] = {"steps": STEPS, "evaluation": {"every_steps": 50, "sequences": 4}}
    deeds: dict[int, Callable[[Run], Any]] = {
        12: kill_worker(1),
        28: kill_host("host-1"),
        44: kill_run,
        60: operated(lambda cluster: cluster.scale(4)),
        76: kill_worker(0),
        92: kill_host("host-2"),
        100: kill_worker(0),  # while the checkpoint of this step is written
        112: kill_run,
        124: operated(lambda cluster: cluster.rebalance()),
        136: kill_host("host-0"),
        148: operated(lambda cluster: cluster.scale(3)),
        160: kill_worker(1),
        172: operated(lambda cluster: cluster.drain("host-1")),
        180: operated(lambda cluster: cluster.undrain("host-1")),
        188: kill_host("host-2"),
    }
    disturbed = Run(
        pool,
        spec_of(
            pool,
            texts,
            tmp_path / "disturbed",
            checkpoints={"folder": str(tmp_path / "disturbed"), "every_steps": 20},
            **common,
        ),
        {step: soon(deed, chance) for step, deed in deeds.items()},
    )
    report = disturbed.train()
    assert report.steps == STEPS
    wait_until(lambda: nothing_trains(pool))
    pool.down()
    model = {"name": "m", "path": str(folder), "train": True}
    with running(
        "alone", folder, hosts=[{"count": 1}], models=[model], endpoint=None, monitoring=None
    ) as one:
        alone = Run(
            one,
            spec_of(
                one,
                texts,
                tmp_path / "alone",
                workers={"count": 1, "num_cpus": 0},
                checkpoints={"folder": str(tmp_path / "alone"), "every_steps": None},
                **common,
            ),
        )
        assert alone.train().steps == STEPS
    # Bit for bit: they are exact.
    assert disturbed.losses == alone.losses
    assert list(disturbed.losses) == list(range(1, STEPS + 1))
