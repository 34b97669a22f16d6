"""A Ray of Moesaic's own: it outlives its starter, and nothing is left of one that fails."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray

from moesaic.actors.runtime import embedded_ray
from moesaic.actors.runtime.embedded_ray import end_embedded, start_embedded
from moesaic.actors.runtime.joining import join
from moesaic.proto.errors import ClusterError
from moesaic.session import is_alive
from tests.helpers.processes import failing_head
from tests.helpers.processes.live import ON_RAY

pytestmark = ON_RAY


@pytest.fixture
def rays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of Rays that do not start."""
    folder = tmp_path / "rays"
    folder.mkdir()
    monkeypatch.setattr(embedded_ray, "_ray_folder", lambda: folder)
    monkeypatch.setattr(embedded_ray, "_HEAD", failing_head.__name__)
    monkeypatch.setenv(failing_head.STARTED, str(tmp_path / "started"))
    monkeypatch.setenv(failing_head.LOG, "")
    return folder


def started(rays: Path) -> list[int]:
    """The processes that were left, and their children."""
    file = rays.with_name("started")
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def ended(pid: int) -> bool:
    try:
        return not is_alive(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return True


def test_what_fails_twice_leaves_nothing_and_says_why(
    rays: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(failing_head.LOG, "no room\nno memory\n")
    other = rays / f"session_2026-01-01_00-00-00_999999_{os.getpid()}"
    other.mkdir()
    unlike = subprocess.Popen([*failing_head.CHILD, str(other)])
    said: list[str] = []
    try:
        with pytest.raises(ClusterError) as caught:
            start_embedded(said.append, num_cpus=1)
        for words in (*said, str(caught.value)):
            assert "timed out during startup" in words
            assert "raylet.err ends with: no room | no memory" in words
        assert len(said) == 1
        assert "Moesaic tries once more" in said[0]
        assert len(started(rays)) == 4
        assert all(map(ended, started(rays)))
        # What was there before is not its own.
        assert list(rays.iterdir()) == [other]
        assert unlike.poll() is None
    finally:
        unlike.kill()
        unlike.wait()


def test_a_start_that_is_interrupted_is_cleaned_up_and_not_tried_again(
    rays: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(failing_head.HANGS, "yes")

    def interrupt() -> None:
        until = time.monotonic() + 60
        while not started(rays) and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        start_embedded(num_cpus=1)
    interrupting.join()
    assert len(started(rays)) == 2
    assert all(map(ended, started(rays)))
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


STARTER = """
import os, signal
from moesaic.actors.runtime.embedded_ray import keep_embedded, start_embedded
from moesaic.session import stay_on_loopback
stay_on_loopback()
own = start_embedded(num_cpus=1)
KEEP
print(own.folder, own.address, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def started_and_killed(keep: str) -> tuple[Path, str]:
    """The folder and the address of a Ray whose starter was killed."""
    done = subprocess.run(
        [sys.executable, "-c", STARTER.replace("KEEP", keep)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder, address = done.stdout.split()
    return Path(folder), address


def test_it_ends_with_its_starter_until_it_is_noted() -> None:
    folder, _ = started_and_killed("")
    until = time.monotonic() + 30
    while left := [one for one in embedded_ray.processes_of(folder.name) if is_alive(one)]:
        assert time.monotonic() < until, left
        time.sleep(0.1)


def test_it_outlives_its_starter_and_ends_as_a_whole() -> None:
    folder, address = started_and_killed("keep_embedded(own.folder)")
    try:
        names = {process.name() for process in embedded_ray.processes_of(folder.name)}
        assert {"gcs_server", "raylet"} <= names
        # Its sockets and logs are behind a door.
        assert {entry.name for entry in folder.iterdir()} > {"sockets", "logs"}
        assert mode(folder.parents[1]) == 0o700
        join(address, insecure=False, log_to_driver=False)
        assert ray.get(ray.remote(lambda: 7).remote()) == 7
        running = embedded_ray.processes_of(folder.name)
    finally:
        end_embedded(folder)
    assert not ray.is_initialized()
    assert not [process for process in running if is_alive(process)]


def test_the_handler_of_a_signal_outlives_a_connection() -> None:
    """In a process of its own, whose handler a default would replace by its death."""
    program = """
import os, signal, time
from moesaic.actors.runtime.joining import join
from moesaic.actors.runtime.embedded_ray import end_embedded, start_embedded
from moesaic.session import stay_on_loopback
stay_on_loopback()
own = start_embedded(num_cpus=1)
join(own.address, insecure=False, log_to_driver=False)
signal.signal(signal.SIGTERM, lambda *_: print("heard", flush=True))
end_embedded(own.folder)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.1)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr
