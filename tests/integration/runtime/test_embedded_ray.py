"""A Ray inside this process that does not start: nothing of it is left, and one more try."""

from __future__ import annotations

import gc
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._private import services

from moesaic.actors.runtime import embedded_ray
from moesaic.actors.runtime.embedded_ray import start_embedded
from moesaic.proto.errors import ClusterError
from tests.helpers.processes.frozen import freeze
from tests.helpers.processes.live import ON_RAY

pytestmark = ON_RAY

CHILD = [sys.executable, "-c", "import time; time.sleep(600)"]
PARENT = "import subprocess, sys, time; subprocess.Popen(sys.argv[2:]); time.sleep(600)"


@pytest.fixture
def rays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(embedded_ray, "_ray_folder", lambda: tmp_path)
    return tmp_path


def starts(rays: Path, log: str, started: list[psutil.Process]) -> Callable[..., None]:
    """`ray.init` that gives up, and leaves processes as Ray does: one named by its session, which
    is stopped and has a child."""

    def init(**options: Any) -> None:
        folder = rays / f"session_2026-01-01_00-00-00_{len(started):06}_{os.getpid()}"
        (folder / "logs").mkdir(parents=True)
        (rays / "session_latest").unlink(missing_ok=True)
        (rays / "session_latest").symlink_to(folder)
        if log:
            (folder / "logs" / "raylet.err").write_text(log)
        command = [sys.executable, "-c", PARENT, f"--session-dir={folder}", *CHILD]
        raylet = psutil.Process(subprocess.Popen(command).pid)
        while not (children := raylet.children()):
            pass
        freeze(raylet.pid)
        started.extend([raylet, *children])
        raise Exception("The current node timed out during startup.")

    return init


def ended(process: psutil.Process) -> bool:
    """Or a zombie that waits for a parent that is not this process."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE and process.ppid() != os.getpid()
    except psutil.NoSuchProcess:
        return True


def test_what_fails_twice_leaves_nothing_and_says_why(
    rays: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = rays / f"session_2026-01-01_00-00-00_999999_{os.getpid()}"
    other.mkdir()
    unlike = subprocess.Popen([*CHILD, str(other)])
    started: list[psutil.Process] = []
    said: list[str] = []
    monkeypatch.setattr(ray, "init", starts(rays, "no room\nno memory\n", started))
    try:
        with pytest.raises(ClusterError) as caught:
            start_embedded(said.append)
        for words in (*said, str(caught.value)):
            assert "timed out during startup" in words
            assert "raylet.err ends with: no room | no memory" in words
        assert len(said) == 1
        assert "Moesaic tries once more" in said[0]
        assert len(started) == 4
        assert all(map(ended, started))
        # What was there before is not its own.
        assert list(rays.iterdir()) == [other]
        assert unlike.poll() is None
    finally:
        unlike.kill()
        unlike.wait()


def test_a_start_that_is_interrupted_is_cleaned_up_and_not_tried_again(
    rays: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[psutil.Process] = []
    real = starts(rays, "", started)

    def init(**options: Any) -> None:
        with pytest.raises(Exception, match="timed out"):
            real()
        raise KeyboardInterrupt

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(KeyboardInterrupt):
        start_embedded()
    assert len(started) == 2
    assert all(map(ended, started))
    assert list(rays.iterdir()) == []


def test_rays_folder_is_in_one_that_no_other_user_enters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_ray, "get_default_system_temp_dir", lambda: str(tmp_path))
    folder = embedded_ray._ray_folder.__wrapped__
    private = tmp_path / f"moesaic-{os.geteuid()}"
    assert folder() == folder() == private / "ray"
    assert mode(private) == 0o700
    # Where another user was first, whatever he made is left alone.
    private.chmod(0o755)
    first, second = folder(), folder()
    assert first != second
    private.rmdir()
    (tmp_path / "elsewhere").mkdir()
    private.symlink_to(tmp_path / "elsewhere")
    for found in (first, second, folder()):
        assert found.parent.parent == tmp_path
        assert found.parent != private
        assert mode(found.parent) == 0o700
    assert list((tmp_path / "elsewhere").iterdir()) == []
    monkeypatch.setattr(embedded_ray, "get_default_system_temp_dir", lambda: "/proc/no")
    with pytest.raises(ClusterError, match="set RAY_TMPDIR to another folder"):
        folder()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.slow
def test_a_raylet_that_hangs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own processes, but for a raylet that never writes a log."""
    pid_file = tmp_path / "raylet.pid"
    raylet = tmp_path / "raylet"
    raylet.write_text(f"#!/bin/sh\necho $$ > {pid_file}\nsleep 600 &\nwait\n")
    raylet.chmod(0o755)
    real, get_node = services.RAYLET_EXECUTABLE, services.get_node
    children = set(psutil.Process().children(recursive=True))

    def impatient(*args: Any, **more: Any) -> Any:
        """Ray itself waits for 30 s."""
        if real == services.RAYLET_EXECUTABLE:
            return get_node(*args, **more)
        raise Exception("The current node timed out during startup.")

    left: list[psutil.Process] = []

    def said(why: str) -> None:
        assert "timed out during startup" in why
        left.extend(set(psutil.Process().children(recursive=True)) - children)
        services.RAYLET_EXECUTABLE = real

    monkeypatch.setattr(services, "RAYLET_EXECUTABLE", str(raylet))
    monkeypatch.setattr(services, "get_node", impatient)
    before = embedded_ray.sessions()
    start_embedded(said, num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        assert left == []
        assert not psutil.pid_exists(int(pid_file.read_text()))
        assert len(embedded_ray.sessions() - before) == 1
        assert ray.get(ray.remote(lambda: 7).remote()) == 7
        # Its sockets and logs are behind a door.
        (session,) = embedded_ray.sessions() - before
        assert {entry.name for entry in session.iterdir()} > {"sockets", "logs"}
        assert mode(session.parents[1]) == 0o700
        # Nothing waits to be collected, and to warn of it in the middle of something else.
        kept = [one for one in gc.get_objects() if issubclass(type(one), subprocess.Popen)]
        assert not [
            one for one in kept if one.returncode is None and not psutil.pid_exists(one.pid)
        ]
    finally:
        ray.shutdown()


def test_the_handler_of_a_signal_outlives_ray() -> None:
    """In a process of its own, whose handler a default would replace by its death."""
    program = """
import os, signal, time
from ray._private import worker
from moesaic.actors.runtime.embedded_ray import end_embedded, start_embedded

def ending(*given, **named):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    print("while Ray's processes end", flush=True)
    end(*given, **named)

start_embedded(num_cpus=1, include_dashboard=False)
signal.signal(signal.SIGTERM, lambda *_: print("heard", flush=True))
end, worker._global_node.kill_all_processes = worker._global_node.kill_all_processes, ending
end_embedded()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.1)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    heard = "heard\nwhile Ray's processes end\nheard\n"
    assert (done.returncode, done.stdout) == (0, heard), done.stderr
