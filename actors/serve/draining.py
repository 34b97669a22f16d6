"""Drain the ingress and the router service before a cluster ends.

Both refuse new requests, and running ones get time to finish. A thin shell around
`cluster/service/draining.py`.
"""

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

from ...cluster.service.draining import Draining, WorkKind
from ...proto.errors import ClusterError
from ..runtime.ray_border import ray_get

log = logging.getLogger(__name__)

# For the first answer: Ray may have to start a worker process first.
BEGIN_S = 20.0
LOOK_S = 0.2
_ANSWER_S = 5.0


class IngressDrain:
    """Calls the ingress from a Ray actor of its own.

    Serve starts threads and handles in a process that calls its applications. They end with
    this actor, and do not stay in the process that ends the cluster.
    """

    def __init__(self, app: str) -> None:
        self._ingress: Any = serve.get_app_handle(app)

    def drain(self, drain_s: float) -> int:
        """Return how many requests run; see `Ingress.drain`."""
        return self._ingress.drain.remote(drain_s).result(timeout_s=_ANSWER_S)

    def running(self) -> int:
        """Return how many requests run; see `Ingress.running`."""
        return self._ingress.running.remote().result(timeout_s=_ANSWER_S)


def drain(
    *,
    drain_s: float,
    app: str | None,
    router_service: Any,
    told: Callable[[str], None],
) -> None:
    """Refuse new requests, and wait at most ``drain_s`` and a few seconds for running ones.

    ``app`` is the cluster's Serve application; it and ``router_service`` may be None. ``told``
    receives the progress line by line. What does not answer is not waited for.
    """
    draining = Draining(drain_s, time.monotonic())
    with ExitStack() as last_first:
        parts: dict[str, tuple[WorkKind, Any]] = {}
        if router_service is not None:
            parts["the router service"] = "call", router_service
        if app is not None:
            end: Any = ray.remote(IngressDrain).options(num_cpus=0).remote(app)
            last_first.callback(ray.kill, end)
            parts["the endpoint"] = "answer", end
        begun = {part: actor.drain.remote(drain_s) for part, (_, actor) in parts.items()}
        until = time.monotonic() + BEGIN_S
        for part, ref in begun.items():
            try:
                running = ray_get(ref, max(0.1, until - time.monotonic()), f"{part}: end")
            except ClusterError as error:
                told(f"ending: {part} does not answer and is ended at once ({error})")
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
                # `Draining` stops waiting for it when it has been silent for too long.
                log.info("%s does not report what still runs: %r", part, error)
        time.sleep(LOOK_S)
