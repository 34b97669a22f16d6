"""A cluster that `moesaic up` starts in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from moesaic.actors.runtime.embedded_ray import _ray_folder, processes_of
from moesaic.session import is_alive
from tests.helpers.paths import ROOT
from tests.helpers.shared_memory import in_shared_memory, left_in_shared_memory

ENVIRONMENT = {"PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT)))}


class Running:
    """A cluster that another process has started."""

    def __init__(self, process: subprocess.Popen[str], name: str, session: Path, log: Path) -> None:
        self.process, self.name, self.log = process, name, log
        self.session = session
        self.owned: set[psutil.Process] = set()

    @property
    def url(self) -> str:
        return json.loads(self.session.read_text())["url"]

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def look(self) -> None:
        """Note what belongs to it now: Ray's workers are nobody's children when Ray has ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.owned |= set(psutil.Process(self.process.pid).children(recursive=True))
        # The folder of a Ray is named by the process that started it, which has soon ended.
        rays = {f for one in self.owned for f in _ray_folder().glob(f"session_*_{one.pid}")}
        with contextlib.suppress(FileNotFoundError):
            rays.add(Path(json.loads(self.session.read_text())["ray_folder"]))
        self.owned |= set(processes_of(*(folder.name for folder in rays)))

    def left(self) -> list[str]:
        return [f"{one.pid} {' '.join(one.cmdline())[:60]}" for one in self.owned if is_alive(one)]


@contextmanager
def starting(
    folder: Path,
    tmp_path: Path,
    *,
    drain_s: float = 60.0,
    program: str = "moesaic.cli.main",
    **spec: Any,
) -> Iterator[Running]:
    """`moesaic up` as it begins to start; ``program`` is the module in its place."""
    name = f"end{os.getpid()}"
    file, log = tmp_path / "spec.yaml", tmp_path / "log"
    values = {
        "name": name,
        "models": [{"name": "m", "path": str(folder)}],
        "hosts": [{"count": 1, "threads": 1}],
        "trunk": {"cache_tokens": 1024, "threads": 1},
        "endpoint": {"port": 0, "drain_s": drain_s},
        "monitoring": {"port": 0},
        **spec,
    }
    file.write_text(yaml.safe_dump(values))
    in_ram = in_shared_memory()
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", program, "up", str(file)],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT, "MOESAIC_CACHE": str(tmp_path / "cache")},
            stdout=sink,
            stderr=sink,
            text=True,
            start_new_session=True,
        )
        running = Running(process, name, tmp_path / "cache" / "run" / f"{name}.json", log)
        try:
            yield running
        finally:
            running.look()
            process.kill()
            process.wait(30)
            for one in running.owned:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
    assert left_in_shared_memory(in_ram) == set()


@contextmanager
def up(folder: Path, tmp_path: Path, **spec: Any) -> Iterator[Running]:
    with starting(folder, tmp_path, **spec) as running:
        wait_until(lambda: "Ctrl-C ends the cluster" in running.said, running, 240)
        running.look()
        yield running


def wait_until(true: Any, running: Running, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, running.said
        assert running.process.poll() is None or true(), running.said
        time.sleep(0.02)


def nothing_is_left(running: Running, *, within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while running.left() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running.left() == []
    assert not running.session.exists()
