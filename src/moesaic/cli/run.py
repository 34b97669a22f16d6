"""`moesaic up`, in the foreground and detached."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.console import Console

from ..about import default_spec
from ..actors.runtime.process_log import rename_log
from ..cluster.spec.spec import Spec, load_spec
from ..private_files import new_private
from ..proto.errors import ClusterError, MoesaicError
from ..session import ClusterSession, find_session, owner_log, remove_own_session
from .ending import EndSignals
from .progress import Lines, Report, bars, read_lines
from .terminal import print_json

if TYPE_CHECKING:
    from ..handle import Cluster

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


# What `moesaic up` starts in a clone of the project.
_HERE = Path("deploy/local.yaml")


def spec_of(given: str | None) -> Spec:
    """Return the spec that `moesaic up` means: a file's, or the default one of a model."""
    if given is None:
        return load_spec(_HERE) if _HERE.is_file() else default_spec("demo")
    if Path(given).suffix in (".yaml", ".yml", ".json") or Path(given).is_file():
        return load_spec(given)
    return default_spec(given)


def print_spec(spec: Spec) -> None:
    """Print a spec as YAML, without the values that are defaults."""
    values = spec.model_dump(mode="json", exclude_defaults=True)
    sys.stdout.write(yaml.safe_dump({"name": spec.name} | values, sort_keys=False))


def run_foreground(given: str | None, progress_fd: int, *, as_json: bool = False) -> None:
    """Start the cluster, print how to reach it, and stay until SIGINT or SIGTERM.

    Running requests may finish then. A second signal ends the cluster at once, in every phase.
    """
    # In the foreground the terminal belongs to the progress and the addresses.
    rename_log("owner", default=logging.WARNING if progress_fd < 0 else logging.INFO)
    spec = spec_of(given)
    with EndSignals(lambda: _end_at_once(spec)) as ends:
        cluster: Cluster | None = None
        try:
            cluster = _start(spec, progress_fd, ends)
            ends.check()
            ends.only_ask()
            _show(spec, cluster, os.getpid(), as_json=as_json)
            if progress_fd < 0:
                err.print("Ctrl-C ends the cluster.")
            ends.asked.wait()
            err.print("ending ...")
        except (KeyboardInterrupt, SystemExit):
            # Ray's handler of SIGTERM raises SystemExit.
            raise KeyboardInterrupt from None
        finally:
            ends.only_ask()
            if cluster is not None:
                cluster.down(told=_warn)
            elif ends.asked.is_set():
                # The start may have been interrupted between two steps, when nothing owned what
                # the last step made.
                _sweep(spec)


def _start(spec: Spec, progress_fd: int, ends: EndSignals) -> Cluster:
    from ..starting import up

    def armed(report: Report) -> Report:
        def progress(step: str, done: int, total: int) -> None:
            ends.arm()
            ends.check()
            report(step, done, total)

        return progress

    if progress_fd < 0:
        with bars(err) as report:
            return up(spec, progress=armed(report), warn=_warn)
    lines = Lines(progress_fd)
    try:
        return up(spec, progress=armed(lines.report), warn=lines.warn)
    except MoesaicError as error:
        lines.fail(error)
        raise
    finally:
        os.close(progress_fd)


def _sweep(spec: Spec) -> None:
    """Remove what is left of a start."""
    from ..actors.serve.end_at_once import end_at_once

    with ExitStack() as last_first:
        # After the session: Ray's code in this process may end the process when its Ray is gone.
        last_first.callback(end_at_once, spec)
        last_first.callback(remove_own_session, spec.name)


def _end_at_once(spec: Spec) -> None:
    """Sweep, in a thread of its own: the main thread may be anywhere, and will not go on."""
    err.print("ending at once")
    _sweep(spec)


def _show(spec: Spec, running: Cluster | ClusterSession, pid: int, *, as_json: bool) -> None:
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
    """Return how this program was called, so that the printed line works as it is."""
    called = Path(sys.argv[0])
    return str(called) if called.name == "moesaic" and os.sep in sys.argv[0] else "moesaic"


def run_detached(given: str | None, *, as_json: bool = False) -> None:
    """Start the cluster in a process of its own, and return when it answers."""
    spec = spec_of(given)
    if find_session(spec.name) is not None:
        raise ClusterError(
            f"name: a cluster {spec.name!r} is running; `moesaic down --name {spec.name}` ends it"
        )
    log = owner_log(spec.name)
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "moesaic.cli.main", "up", *([] if given is None else [given])]
    with os.fdopen(new_private(log), "wb") as sink:
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
        _end(child)
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
    err.print(
        f"The cluster runs in the background (process {session.pid}, log {log}); `{end}` ends it."
    )


def _end(child: subprocess.Popen[bytes]) -> None:
    """Wait until a cancelled start has been undone.

    Another Ctrl-C ends the start at once; a third one does not wait for the process either.
    """
    child.terminate()
    try:
        child.wait()
    except KeyboardInterrupt:
        child.terminate()
        child.wait()


def _warn(text: str) -> None:
    err.print(text, markup=False, soft_wrap=True)


def _last_line(log: Path) -> str:
    text = log.read_text(errors="replace").strip().splitlines()
    return text[-1] if text else "(nothing)"
