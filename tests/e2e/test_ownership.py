"""No process owns a cluster: whichever is killed, answers end whole, and `down` leaves nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from moesaic import Client
from moesaic.session import is_alive
from tests.helpers.paths import ROOT
from tests.helpers.processes.keepers import keepers
from tests.helpers.processes.listening import kind_of
from tests.helpers.processes.live import streams, text_of
from tests.helpers.processes.live import wait_until as settles
from tests.helpers.processes.started import (
    ENVIRONMENT,
    Running,
    nothing_is_left,
    starting,
    up,
    wait_until,
)
from tests.integration.conftest import save_model

pytestmark = [pytest.mark.alone, pytest.mark.timeout(600)]

STREAMS, TOKENS = 16, 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "mixtral")


def command(running: Running, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of the same user, which knows the cluster by its session file alone."""
    return subprocess.run(
        [sys.executable, "-m", "moesaic.cli.main", *words, "--name", running.name],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "MOESAIC_CACHE": str(running.session.parents[1])},
        capture_output=True,
        text=True,
        timeout=240,
    )


def moesaic(running: Running, *words: str) -> str:
    done = command(running, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def hosts_told(running: Running) -> list[str]:
    """Those that are up; none while the controller is restarted."""
    done = command(running, "status", "--json")
    told = json.loads(done.stdout)["cluster"] if done.returncode == 0 else None
    return [host["name"] for host in (told or {"hosts": []})["hosts"] if host["state"] == "up"]


def parts(running: Running, kind: str) -> list[psutil.Process]:
    if kind == "up":
        return [psutil.Process(running.process.pid)]
    if kind == "memory keeper":
        # Nobody's children; each ends with its node's raylet.
        return [one for raylet in parts(running, "raylet") for one in keepers(raylet.pid)]
    return [one for one in running.owned if is_alive(one) and kind_of(one) == kind]


def test_whatever_is_killed_answers_end_whole(folder: Path, tmp_path: Path) -> None:
    model = {"name": "m", "path": str(folder), "replicas": 2}
    hosts = [{"count": 2, "max_count": 3, "threads": 1}]
    more = {"models": [model], "hosts": hosts, "router": {"port": 0}}
    with up(folder, tmp_path, **more) as running:
        started = set(parts(running, "memory keeper"))
        with Client(running.url, retries=0) as client:
            expected = text_of(client, "m", TOKENS)
            for kind in ("controller", "memory keeper", "up"):
                running.look()
                victims = parts(running, kind)
                assert victims, kind
                with streams(client, "m", TOKENS, STREAMS) as texts:
                    for victim in victims:
                        victim.kill()
                    assert texts() == {expected}, kind
                # The others do their work, and the controller's successor knows them.
                settles(lambda: hosts_told(running) == ["host-0", "host-1"], 60)
            running.process.wait(10)
            moesaic(running, "scale", "3")
            assert text_of(client, "m", TOKENS) == expected
        running.look()
        started |= set(parts(running, "memory keeper"))
        assert json.loads(moesaic(running, "down", "--json"))["ended"]
        nothing_is_left(running)
        assert not [keeper for keeper in started if is_alive(keeper)]


@pytest.mark.slow
@pytest.mark.parametrize("finished_by", ["down", "up"])
def test_a_start_that_is_cut_off_is_cleaned_up_by_the_next_command(
    folder: Path, tmp_path: Path, finished_by: str
) -> None:
    with starting(folder, tmp_path) as running:
        wait_until(lambda: "starting hosts" in running.said, running, 240)
        running.look()
        running.process.kill()
        running.process.wait(10)
        running.look()
        assert running.left(), "Ray runs on"
        if finished_by == "down":
            assert json.loads(moesaic(running, "down", "--json"))["ended"]
            nothing_is_left(running)
        else:
            with up(folder, tmp_path) as second:
                assert "was cut off; what it left is ended" in second.said
                assert running.left() == []
                with Client(second.url) as client:
                    assert text_of(client, "m", 3)
