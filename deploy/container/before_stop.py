#!/usr/bin/env python3
"""What a pod does before Kubernetes ends it: it lets running answers finish, for a bounded time.

before-stop head --settle-s 5 --drain-s 30 --metrics http://127.0.0.1:8002/metrics
before-stop worker --settle-s 5 --drain-s 30

Ray's processes end at once on SIGTERM, so whatever should finish has to finish before. On the head
the pod waits until the endpoint answers no request any more. A worker tells Ray that its node ends;
Serve then starts trunks elsewhere, sends them the new requests, and ends those of this node once
their answers are done. Only the standard library is imported, to begin at once.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from urllib.error import URLError
from urllib.request import urlopen

_RUNNING = re.compile(r"^moesaic_requests_running(?:\{[^}]*\})? (\S+)", re.MULTILINE)
# /metrics waits up to 6 s for parts of the cluster that do not answer.
_ASK_S = 8.0
_PAUSE_S = 0.5


def requests_running(metrics: str, timeout_s: float) -> float | None:
    """Return how many requests the endpoint answers; None if that cannot be told in time.

    Where nothing listens there is no endpoint, and so no request.
    """
    try:
        with urlopen(metrics, timeout=timeout_s) as answer:
            text = answer.read().decode()
    except URLError as error:
        return 0.0 if isinstance(error.reason, ConnectionRefusedError) else None
    except (OSError, ValueError):
        return None
    return sum(float(count) for count in _RUNNING.findall(text))


def wait_idle(
    running: Callable[[float], float | None],
    drain_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Wait until no request runs, for about ``drain_s`` at most; return whether none does.

    ``running(timeout_s)`` is `requests_running`.
    """
    deadline = clock() + drain_s
    while running(max(_PAUSE_S, min(_ASK_S, deadline - clock()))) != 0:
        left = deadline - clock()
        if left <= 0:
            return False
        sleep(min(_PAUSE_S, left))
    return True


def drain_command(deadline_s: float) -> list[str]:
    """Return the command by which Ray learns that this node ends in ``deadline_s`` seconds."""
    return [
        "ray",
        "drain-node",
        "--reason=DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message=Kubernetes ends the pod",
        f"--deadline-remaining-seconds={max(1, round(deadline_s))}",
    ]


def end_worker(settle_s: float, drain_s: float) -> None:
    """Tell Ray that this node ends, and wait; the container ends earlier if nothing is left."""
    begun = time.monotonic()
    try:
        subprocess.run(drain_command(settle_s + drain_s), timeout=settle_s + drain_s, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"Ray was not told that this node ends: {error}", file=sys.stderr)
    time.sleep(max(0.0, begun + settle_s + drain_s - time.monotonic()))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="before-stop", description="let running answers finish")
    parser.add_argument("part", choices=["head", "worker"])
    parser.add_argument(
        "--settle-s",
        type=float,
        required=True,
        help="seconds until load balancers have stopped sending",
    )
    parser.add_argument("--drain-s", type=float, required=True, help="endpoint.drain_s of the spec")
    parser.add_argument("--metrics", help="the endpoint's metrics; without it all time is waited")
    asked = parser.parse_args(words)
    if asked.part == "worker":
        end_worker(asked.settle_s, asked.drain_s)
        return 0
    # Until the pod is out of all load balancers, new requests still arrive.
    time.sleep(asked.settle_s)
    if asked.metrics is None:
        time.sleep(asked.drain_s)
    elif not wait_idle(partial(requests_running, asked.metrics), asked.drain_s):
        print(f"answers may still run after {asked.drain_s:g} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
