"""`moesaic up`, in the foreground and detached."""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.console import Console

from ..about import default_spec
from ..actors.runtime.process_log import rename_log
from ..cluster.spec.spec import Spec, load_spec
from ..proto.errors import ClusterError
from ..session import (
    find_session,
    is_alive,
    is_noted,
    need_session,
    own_session,
    remove_session,
)
from .ending import EndSignals
from .terminal import bars, print_json

if TYPE_CHECKING:
    from ..handle import Cluster

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

# Seconds between two looks at whether the cluster is still there.
LOOK_S = 0.5
# `down` removes the session this long after Ray, at most.
ENDING_S = 20.0


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


def run(given: str | None, *, detach: bool, as_json: bool) -> None:
    """Start the cluster, print how to reach it, and stay until SIGINT or SIGTERM unless ``detach``.

    Running requests may finish then. A second signal ends the cluster at once, in every phase.
    """
    # The terminal belongs to the progress and the addresses.
    rename_log("up", default=logging.WARNING)
    spec = spec_of(given)
    with EndSignals(lambda: _end_at_once(spec)) as ends:
        cluster: Cluster | None = None
        try:
            cluster = _start(spec, ends)
            ends.check()
            ends.only_ask()
            _show(spec, cluster, as_json=as_json)
            sys.stdout.flush()
            if detach:
                cluster.detach()
                cluster = None
                name = "" if spec.name == "local" else f" --name {spec.name}"
                err.print(f"The cluster runs in the background; `moesaic down{name}` ends it.")
                return
            err.print("Ctrl-C ends the cluster.")
            if _stay(spec.name, ends):
                err.print("ending ...")
            else:
                err.print(f"cluster {spec.name} is down")
                cluster.detach()
                cluster = None
        except (KeyboardInterrupt, SystemExit):
            # Ray's handler of SIGTERM raises SystemExit.
            raise KeyboardInterrupt from None
        finally:
            ends.only_ask()
            if cluster is not None:
                cluster.down(told=_warn)
            elif ends.asked.is_set():
                # The start may have been interrupted between two steps, when nothing knew of what
                # the last step made.
                _sweep(spec)


def _stay(name: str, ends: EndSignals) -> bool:
    """Wait for a signal, and return True; return False if the cluster has ended meanwhile."""
    session = need_session(name)
    raylet = session.raylet() if session.embedded else None
    if raylet is not None:
        # A process that is connected to a Ray may end with that Ray.
        from ..actors.runtime.embedded_ray import disconnect

        disconnect()
    alone = 0.0  # for how long the session has been there without its Ray
    while not ends.asked.wait(LOOK_S):
        if not is_noted(session):
            return False
        alone = alone + LOOK_S if raylet is not None and not is_alive(raylet) else 0.0
        if alone > ENDING_S:
            find_session(name)  # removes what is left
            raise ClusterError(
                f"the Ray of cluster {name!r} has died, and the cluster with it; its logs are in "
                f"{session.logs}"
            )
    return True


def _start(spec: Spec, ends: EndSignals) -> Cluster:
    from ..starting import up

    with bars(err) as report:

        def progress(step: str, done: int, total: int) -> None:
            ends.arm()
            ends.check()
            report(step, done, total)

        return up(spec, progress=progress, warn=_warn)


def _sweep(spec: Spec) -> None:
    """Remove what is left of a start."""
    from ..actors.serve.end_at_once import end_at_once

    session = own_session(spec.name)
    with ExitStack() as last_first:
        if session is not None and not session.embedded:
            last_first.callback(remove_session, session)
        last_first.callback(end_at_once, spec)
        if session is not None and session.embedded:
            # Before its Ray: Ray's code in this process may end the process when its Ray is gone.
            last_first.callback(remove_session, session)


def _end_at_once(spec: Spec) -> None:
    """Sweep, in a thread of its own: the main thread may be anywhere, and will not go on."""
    err.print("ending at once")
    _sweep(spec)


def _show(spec: Spec, running: Cluster, *, as_json: bool) -> None:
    models = [model.name for model in spec.models]
    if as_json:
        found = {
            "name": spec.name,
            "url": running.url,
            "monitoring": running.monitoring,
            "router": running.router,
            "models": models,
        }
        print_json(found)
        return
    print_address(spec.name, running.url, models)
    if running.monitoring is not None:
        out.print(f"monitoring: {running.monitoring} (the page), /status, /metrics")
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


def _warn(text: str) -> None:
    err.print(text, markup=False, soft_wrap=True)
