"""Ending without cutting anything off: the ingress and the router service refuse what is new, and
what runs has its time. A thin shell around `cluster/service/draining.py`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from ...cluster.service.draining import Draining, Kind
from ...proto.errors import ClusterError
from ..runtime.ray_border import ask

log = logging.getLogger(__name__)

# To begin with: a worker of Ray may have to start first.
BEGIN_S = 20.0
LOOK_S = 0.2
_ANSWER_S = 5.0


class IngressEnd:
    """Runs as a Ray actor: what Serve leaves in a process that calls its applications ends with
    it, and not with the one that owns the cluster."""

    def __init__(self, app: str) -> None:
        self._ingress: Any = serve.get_app_handle(app)

    def drain(self, drain_s: float) -> int:
        """See `serve_app.Ingress.drain`."""
        return self._ingress.drain.remote(drain_s).result(timeout_s=_ANSWER_S)

    def running(self) -> int:
        """See `serve_app.Ingress.running`."""
        return self._ingress.running.remote().result(timeout_s=_ANSWER_S)


def drain(
    *,
    drain_s: float,
    app: str | None,
    router_service: Any,
    told: Callable[[str], None],
) -> None:
    """Let the application ``app`` of Serve and the router service, where there are such, refuse
    what is new, and wait for what runs: at most ``drain_s`` and a few seconds. ``told`` hears of
    it, line by line. What does not answer is not waited for."""
    draining = Draining(drain_s, time.monotonic())
    with ExitStack() as last_first:
        parts: dict[str, tuple[Kind, Any]] = {}
        if router_service is not None:
            parts["the router service"] = "call", router_service
        if app is not None:
            end: Any = ray.remote(IngressEnd).options(num_cpus=0).remote(app)
            last_first.callback(ray.kill, end)
            parts["the endpoint"] = "answer", end
        begun = {part: actor.drain.remote(drain_s) for part, (_, actor) in parts.items()}
        until = time.monotonic() + BEGIN_S
        for part, ref in begun.items():
            try:
                running = ask(ref, max(0.1, until - time.monotonic()), f"{part}: end")
            except ClusterError as error:
                told(f"ending: {part} does not answer, and ends at once ({error})")
                continue
            now = time.monotonic()
            draining.expect(part, parts[part][0], now)
            draining.heard(part, running, now)
        _wait(draining, {part: parts[part][1] for part in begun}, told)


def _wait(draining: Draining, actors: dict[str, Any], told: Callable[[str], None]) -> None:
    while True:
        now = time.monotonic()
        if (line := draining.news(now)) is not None:
            told(line)
        if not draining.waits(now):
            return
        for part in draining.parts:
            try:
                running: Any = ray.get(actors[part].running.remote(), timeout=_ANSWER_S)
                draining.heard(part, running, time.monotonic())
            except (RayError, RayServeException, TimeoutError) as error:
                # Waited for until it has been silent for long, or is gone.
                log.info("%s does not say what runs: %r", part, error)
        time.sleep(LOOK_S)
