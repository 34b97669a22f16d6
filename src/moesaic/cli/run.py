"""`moesaic up`, in the foreground and detached."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ..cluster.spec import Spec, load_spec
from ..proto.errors import ClusterError, MoesaicError
from ..session import Session, find_session, session_dir
from .output import print_json
from .progress import Lines, Report, bars, read_lines

if TYPE_CHECKING:
    from ..handle import Cluster

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def run_foreground(path: Path, progress_fd: int, *, as_json: bool = False) -> None:
    """Start the cluster, say how to reach it, stay until SIGINT or SIGTERM."""
    spec = load_spec(path)
    stop = threading.Event()
    _stop_on_signals(stop)
    from ..handle import up

    def interruptible(report: Report) -> Report:
        def progress(step: str, done: int, total: int) -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            report(step, done, total)

        return progress

    if progress_fd < 0:
        with bars(err) as report:
            cluster = up(spec, progress=interruptible(report), warn=_warn)
    else:
        lines = Lines(progress_fd)
        try:
            cluster = up(spec, progress=interruptible(lines.report), warn=lines.warn)
        except MoesaicError as error:
            lines.fail(error)
            raise
        finally:
            os.close(progress_fd)
    with cluster:
        _show(spec, cluster, os.getpid(), as_json=as_json)
        if progress_fd < 0:
            err.print("Ctrl-C ends it.")
        stop.wait()
        err.print("ending ...")
        # A second Ctrl-C must not leave half a cluster.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _stop_on_signals(stop: threading.Event) -> None:
    def on_signal(signum: int, frame: object) -> None:
        stop.set()

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)


def _show(spec: Spec, running: Cluster | Session, pid: int, *, as_json: bool) -> None:
    models = [model.name for model in spec.models]
    if as_json:
        found = {
            "name": spec.name,
            "url": running.url,
            "monitoring": running.monitoring,
            "router": running.router,
            "models": models,
            "pid": pid,
        }
        print_json(found)
        sys.stdout.flush()
        return
    print_address(spec.name, running.url, models)
    if running.monitoring is not None:
        out.print(f"monitoring: {running.monitoring}/status, /metrics")
    if running.router is not None:
        out.print(f"router service: {running.router}")


def print_address(name: str, url: str | None, models: list[str]) -> None:
    if url is None:
        out.print(f"cluster {name} is up (no endpoint in its spec)")
        return
    out.print(f"cluster {name} is up: {url}")
    if models:
        body = json.dumps(
            {
                "model": models[0],
                "messages": [{"role": "user", "content": "What is a mosaic?"}],
                "stream": True,
            }
        )
        out.print("\nTry it:")
        out.print(
            f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
            soft_wrap=True,
        )
        option = "" if name == "local" else f" --name {name}"
        out.print(f'  {_program()} chat{option} "What is a mosaic?"\n', soft_wrap=True)


def _program() -> str:
    """How this program was called, so that the line printed works as it is."""
    called = Path(sys.argv[0])
    return str(called) if called.name == "moesaic" and os.sep in sys.argv[0] else "moesaic"


def run_detached(path: Path, *, as_json: bool = False) -> None:
    """Start the cluster in a process of its own, and return when it answers."""
    spec = load_spec(path)
    if find_session(spec.name) is not None:
        raise ClusterError(f"name: a cluster {spec.name!r} is running; `moesaic down` ends it")
    session_dir().mkdir(parents=True, exist_ok=True, mode=0o700)
    log = session_dir() / f"{spec.name}.log"
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "moesaic.cli.main", "up", str(path)]
    with log.open("wb") as sink:
        child = subprocess.Popen(
            [*command, "--progress-fd", str(writer)],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            pass_fds=[writer],
            start_new_session=True,
        )
    os.close(writer)
    try:
        with os.fdopen(reader) as steps, bars(err) as progress:
            failed = read_lines(steps, progress, _warn)
    except KeyboardInterrupt:
        child.terminate()
        raise
    session = find_session(spec.name)
    if failed is not None:
        child.wait(timeout=60)
        raise failed
    if session is None:
        child.wait(timeout=60)
        raise ClusterError(f"the cluster did not start; {log} ends with: {_last_line(log)}")
    _show(spec, session, session.pid, as_json=as_json)
    end = "moesaic down" if spec.name == "local" else f"moesaic down --name {spec.name}"
    err.print(f"It runs in the background (process {session.pid}, log {log}); `{end}` ends it.")


def _warn(text: str) -> None:
    err.print(text, markup=False, soft_wrap=True)


def _last_line(log: Path) -> str:
    text = log.read_text(errors="replace").strip().splitlines()
    return text[-1] if text else "(nothing)"
