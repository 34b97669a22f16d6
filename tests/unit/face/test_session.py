"""Session files: of one user alone, made without following links, and looked at before they are
used. The stranger is another user of this machine, or whoever can write in the folder."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from moesaic import handle, private_files, session
from moesaic.handle import Cluster
from moesaic.private_files import replace_file
from moesaic.proto.errors import ClusterError
from moesaic.session import (
    ClusterSession,
    find_session,
    is_noted,
    logged_session,
    need_session,
    note_logs,
    remove_session,
    session_dir,
    this_process,
    write_session,
)
from moesaic.traces import write_trace
from tests.unit.face.test_traces import totals

STRANGER = 65_534


RAY_FOLDER = "/tmp/ray/session_2026-01-01_00-00-00_123456_1"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ClusterSession, "alive", True)
    return tmp_path


def announce(**more: Any) -> ClusterSession:
    values: dict[str, Any] = {
        "name": "c",
        "pid": 1,
        "started": 0.0,
        "ray_address": "127.0.0.1:6379",
        "ray_folder": RAY_FOLDER,
        "url": "http://127.0.0.1:8000",
        "ray_token": "ab12",
        "logs": "/tmp/ray/session/logs",
    }
    found = ClusterSession(**(values | more))
    write_session(found)
    return found


def file() -> Path:
    return session_dir() / "c.json"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def reason() -> str:
    with pytest.raises(ClusterError) as caught:
        find_session("c")
    return str(caught.value)


# ---- made ---------------------------------------------------------------------------------------


def test_it_is_this_users_alone_whatever_the_umask_is() -> None:
    before = os.umask(0)
    try:
        written = announce()
        note_logs("c", "/tmp/ray/session/logs")
    finally:
        os.umask(before)
    assert find_session("c") == written
    assert mode(session_dir()) == 0o700
    assert {entry.name: mode(entry) for entry in session_dir().iterdir()} == {
        "c.json": 0o600,
        "c.logs": 0o600,
    }


def test_a_folder_that_others_could_read_is_closed() -> None:
    session_dir().mkdir(parents=True, mode=0o755)
    announce()
    assert mode(session_dir()) == 0o700


@pytest.mark.parametrize("name", ["c.json", "c.logs"])
def test_no_link_is_written_through(name: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    session_dir().mkdir(parents=True, mode=0o700)
    (session_dir() / name).symlink_to(victim)
    # The name that drafts had, before they were random.
    (session_dir() / f"c.{os.getpid()}").symlink_to(victim)
    written = announce()
    note_logs("c", "/tmp/ray/session/logs")
    assert victim.read_text() == "precious"
    assert not (session_dir() / name).is_symlink()
    assert find_session("c") == written


def test_a_folder_that_is_a_link_or_open_to_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    session_dir().parent.mkdir()
    session_dir().symlink_to(tmp_path / "elsewhere")
    for attempt in (announce, lambda: note_logs("c", "/x")):
        with pytest.raises(ClusterError, match="is a symbolic link, which Moesaic does not follow"):
            attempt()
    session_dir().unlink()
    session_dir().mkdir(mode=0o700)
    session_dir().chmod(0o770)
    with pytest.raises(ClusterError, match=f"0770 .*chmod 700 {session_dir()}"):
        announce()
    assert list(session_dir().iterdir()) == []


def test_a_draft_that_cannot_be_finished_is_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(private_files.os, "replace", full)
        with pytest.raises(ClusterError, match="No space left"):
            announce()
    assert list(session_dir().iterdir()) == []


def test_a_trace_is_not_written_through_a_link(tmp_path: Path) -> None:
    from moesaic.cluster.load.trace import TraceRecorder

    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f".out.{os.getpid()}").symlink_to(victim)
    recorder = TraceRecorder(1.0, totals(1, 1, 2))
    recorder.add(totals(1, 3, 4))
    write_trace(tmp_path / "out", recorder.trace())
    assert victim.read_text() == "precious"
    assert {entry.name for entry in tmp_path.iterdir()} == {"out", "victim", f".out.{os.getpid()}"}
    # As the user's other files are.
    before = os.umask(0o027)
    try:
        replace_file(tmp_path / "out", b"")
    finally:
        os.umask(before)
    assert mode(tmp_path / "out") == 0o640


# ---- read ---------------------------------------------------------------------------------------


def test_kind_mode_and_folder_are_looked_at() -> None:
    written = announce()
    file().chmod(0o640)
    assert f"{file()}: the file's mode 0640" in reason()
    file().chmod(0o600)
    session_dir().chmod(0o770)
    assert f"chmod 700 {session_dir()}" in reason()
    session_dir().chmod(0o700)
    assert find_session("c") == written

    file().rename(session_dir() / "other")
    file().symlink_to(session_dir() / "other")
    assert "is a symbolic link" in reason()
    file().unlink()
    os.mkfifo(file(), 0o600)
    assert "not a regular file; remove it" in reason()  # and is not waited for
    file().unlink()
    file().mkdir(mode=0o700)
    assert "not a regular file; remove it" in reason()
    with pytest.raises(ClusterError, match="not a regular file"):
        need_session("c")


def test_what_belongs_to_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    announce()
    if os.geteuid() == 0:
        os.chown(file(), STRANGER, -1)
        assert f"{file()}: the owner is user {STRANGER}" in reason()
        os.chown(session_dir(), STRANGER, -1)
        assert f"{session_dir()}: the owner is user {STRANGER}" in reason()
        with pytest.raises(ClusterError, match="the owner is user"):
            announce(name="d")
    else:
        me = os.geteuid()
        monkeypatch.setattr(private_files.os, "geteuid", lambda: STRANGER)
        assert f"{session_dir()}: the owner is user {me}" in reason()


def test_a_client_needs_no_more_than_the_standard_library_to_read_one() -> None:
    code = (
        "import sys; from moesaic.session import find_session; assert find_session('c') is None;"
        "print(sorted({'psutil', 'pydantic', 'numpy', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pid", 0),
        ("pid", -1),
        ("pid", "1"),
        ("pid", True),
        ("started", "now"),
        ("ready", "yes"),
        ("ray_folder", "/home/someone"),
        ("ray_folder", "session_1"),
        ("name", "d"),
        ("url", "file:///etc/passwd"),
        ("url", "https://127.0.0.1:8000"),
        ("url", "http://me:secret@10.0.0.1:80"),
        ("url", "http://10.0.0.1"),
        ("url", "http://10.0.0.1:80/v1?x=1"),
        ("url", "http://10.0.0.1:99999"),
        ("url", ["http://10.0.0.1:80"]),
        ("router", "10.0.0.1"),
        ("router", "http://10.0.0.1:80"),
        ("ray_address", "ray://10.0.0.1:10001"),
        ("ray_address", ""),
        ("ray_token", "two\nlines"),
        ("ray_token", ""),
        ("logs", "relative/folder"),
        ("logs", "/a\0b"),
    ],
)
def test_values_that_no_cluster_writes(key: str, value: Any) -> None:
    announce()
    file().write_text(json.dumps(json.loads(file().read_text()) | {key: value}))
    said = reason()
    assert said.startswith(f"{file()}: {key}: ")
    assert "remove the file" in said
    assert file().exists()


def test_values_that_clusters_write() -> None:
    for more in (
        {"url": None, "ray_token": None, "logs": None},
        {"url": "http://10.0.0.1:8000/pair", "router": "[::1]:8001", "ray_address": "[fe80::1]:1"},
        {"url": "http://[::1]:8000", "router": "node-1.example:8001", "ray_insecure": True},
    ):
        written = announce(**more)
        assert find_session("c") == written
    # One of a version that says more, or less.
    values = json.loads(file().read_text())
    del values["ray_insecure"]
    file().write_text(json.dumps(values | {"more": 1}))
    assert find_session("c") is not None


def test_what_is_no_json_is_told_and_kept() -> None:
    announce()
    file().write_text("{")
    assert "remove the file" in reason()
    file().write_text("[]")
    assert "it is not a JSON object" in reason()
    file().write_text('{"name": "c"}')
    assert "missing" in reason()
    file().write_bytes(b"\xff" * 10)
    assert "remove the file" in reason()
    with file().open("wb") as opened:
        opened.truncate(1 << 30)
    assert "bytes, which no cluster writes" in reason()


def test_the_token_is_in_no_text_of_a_session() -> None:
    assert "ab12" not in repr(announce(ray_token="ab12 and more"))
    assert "ab12" not in reason()


def test_logs_of_a_start_are_read_with_the_same_care() -> None:
    note_logs("c", "/tmp/ray/session/logs")
    assert logged_session("c").logs == "/tmp/ray/session/logs"
    noted = session_dir() / "c.logs"
    noted.chmod(0o666)
    with pytest.raises(ClusterError, match="mode 0666 lets"):
        logged_session("c")
    noted.chmod(0o600)
    noted.write_text("../../elsewhere")
    with pytest.raises(ClusterError, match=f"{noted} does not hold the absolute path"):
        logged_session("c")


# ---- alive --------------------------------------------------------------------------------------


@pytest.fixture
def own_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process as Ray's raylet is: by its name, and by the folder in its command line."""
    monkeypatch.undo()
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    program = tmp_path / "raylet"
    program.write_text("#!/bin/sh\nread forever\n")
    program.chmod(0o700)
    raylet = subprocess.Popen([program, f"--session_dir={RAY_FOLDER}"], stdin=subprocess.PIPE)
    try:
        until = time.monotonic() + 10
        while psutil.Process(raylet.pid).name() != "raylet":
            assert time.monotonic() < until
        yield raylet
    finally:
        raylet.kill()
        raylet.communicate()


def test_a_cluster_on_its_own_ray_is_there_while_its_raylet_is(
    own_ray: subprocess.Popen[bytes],
) -> None:
    written = announce()
    assert find_session("c") == written
    other = announce(name="d", ray_folder="/tmp/ray/session_2026_2")
    assert not other.alive
    own_ray.kill()
    # It is a zombie until somebody waits for it.
    until = time.monotonic() + 10
    while psutil.Process(own_ray.pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
    assert find_session("c") is None
    assert not file().exists()


def test_a_raylet_of_another_user_is_none_of_ours(
    own_ray: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = announce()
    assert written.alive
    monkeypatch.setattr(session.os, "getuid", lambda: STRANGER)
    assert not written.alive


def test_a_cluster_on_another_ray_is_there_while_that_answers(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("MOESAIC_CACHE", str(cache / "cache"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        written = announce(ray_folder=None, ray_address=address)
        assert find_session("c") == written
    # Its GCS may come back.
    assert find_session("c") is None
    assert file().exists()


def test_a_start_that_was_cut_off_is_told_from_one_under_way() -> None:
    pid, began = this_process()
    assert announce(pid=pid, started=began, ready=False).starts
    with pytest.raises(ClusterError, match=f"still starting .process {pid}"):
        need_session("c")
    assert not announce(pid=pid, started=began).starts
    for more in ({"started": began - 60}, {"pid": dead_process()}):
        assert not announce(**({"pid": pid, "started": began, "ready": False} | more)).starts
        with pytest.raises(ClusterError, match="was cut off; `moesaic down --name c` removes"):
            need_session("c")


def dead_process() -> int:
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


def test_the_file_of_a_later_cluster_of_that_name_stays() -> None:
    first = announce(id="1")
    later = announce(id="2")
    assert not is_noted(first)
    assert is_noted(later)
    remove_session(first)
    assert find_session("c") == later
    remove_session(later)
    assert not file().exists()
    remove_session(later)


def test_an_end_that_fails_keeps_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    written = announce(ray_folder=None)
    monkeypatch.setattr(ClusterSession, "alive", False)
    with pytest.raises(ClusterError, match=r"nothing answers at 127\.0\.0\.1:6379"):
        Cluster(written).down()
    monkeypatch.setattr(ClusterSession, "alive", True)
    for error in (ClusterError("late"), KeyboardInterrupt()):

        def fails(*_: Any, error: BaseException = error) -> str:
            raise error

        monkeypatch.setattr(Cluster, "_join", fails)
        monkeypatch.setattr(ClusterSession, "answers", True)
        with pytest.raises(type(error)):
            Cluster(written).down()
        assert find_session("c") == written


def test_no_other_ray_is_taken_for_the_clusters_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from moesaic.actors.runtime import ray_border

    monkeypatch.setattr(ray_border, "join_ray", lambda *_, **__: None)
    monkeypatch.setattr(ray_border, "ray_address", lambda: "10.0.0.1:6379")
    monkeypatch.setattr(ClusterSession, "answers", True)
    with pytest.raises(ClusterError, match=r"connected to the one at 10\.0\.0\.1:6379"):
        Cluster(announce()).down()
    assert find_session("c") is not None


def test_rays_token_is_shown_and_not_left_to_other_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from moesaic.actors.runtime import ray_border

    seen: list[tuple[str | None, str | None, bool]] = []

    def joined(address: str, name: str, *, insecure: bool) -> None:
        environment = os.environ.get
        seen.append((environment("RAY_AUTH_TOKEN"), environment("RAY_AUTH_MODE"), insecure))

    monkeypatch.setattr(ray_border, "join_ray", joined)
    monkeypatch.setattr(ray_border, "ray_address", lambda: "127.0.0.1:6379")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of another")
    announce()
    handle.connect("c")._join()
    assert seen == [("ab12", None, False)]
    assert os.environ["RAY_AUTH_TOKEN"] == "of another"
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    handle.connect("c")._join()
    assert "RAY_AUTH_TOKEN" not in os.environ
