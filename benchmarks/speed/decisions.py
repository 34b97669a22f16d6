"""What the router decides for one layer's call: seconds of its state machine alone.

    python -m benchmarks.speed.decisions [--json PATH] [--rounds N]

8 tokens with 8 of 64 experts each, over 2 and 32 hosts; no sockets and no tensors. Each answer
arrives by itself. The table has the tenth percentile and the median of the calls.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import write_json
from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.placement import (
    HostEntry,
    ModelShape,
    Placement,
    PlacementId,
    initial_placement,
)
from moesaic.cluster.routing.dispatch import Dispatcher
from moesaic.cluster.routing.events import HostUp, Replied, Send
from moesaic.cluster.routing.policy import RouterPolicy

KEY, EXPERTS, TOKENS, TOP_K = LayerKey("m", 0), 64, 8, 8


def connected(hosts: int) -> Dispatcher:
    """Return a router's state machine that knows so many hosts."""
    entries = {
        f"host-{n}": HostEntry(
            host=f"host-{n}", incarnation=1, node="n", shm_address="", grpc_address=""
        )
        for n in range(hosts)
    }
    layers = initial_placement([ModelShape(model="m", experts={0: EXPERTS})], list(entries))
    dispatcher = Dispatcher(RouterPolicy())
    dispatcher.place(Placement(PlacementId(1, 1), entries, layers), 0.0)
    for name in entries:
        dispatcher.handle(HostUp(name, 1), 0.0)
    return dispatcher


def one_call(dispatcher: Dispatcher, ids_TK: np.ndarray, now: float) -> float:
    """Return the seconds of the decisions for one call."""
    began = time.perf_counter()
    call, commands = dispatcher.begin(KEY, ids_TK, max_rows=512, now=now)
    for command in commands:
        if isinstance(command, Send):
            # The host names the versions that it used, as they were asked for.
            versions = command.version, command.other_versions
            dispatcher.handle(Replied(command.host, command.seq, versions), now, more=True)
            dispatcher.tick(now)
    took_s = time.perf_counter() - began
    assert call.outcome is not None and call.outcome.ok
    return took_s


def measure(hosts: int, rounds: int) -> list[float]:
    rng = np.random.default_rng(0)
    dispatcher = connected(hosts)
    ids = [
        np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(TOKENS)]).astype(np.int32)
        for _ in range(64)
    ]
    now = time.monotonic()
    return [one_call(dispatcher, ids[n % 64], now + n * 1e-3) for n in range(rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--rounds", type=int, default=3000)
    arguments = parser.parse_args()
    table = Table("hosts", "p10", "median", title="Decisions of one call, 8 tokens, top-8 of 64")
    found = {}
    for hosts in (2, 32):
        took_us = sorted(1e6 * took for took in measure(hosts, arguments.rounds)[100:])
        p10, median = took_us[len(took_us) // 10], statistics.median(took_us)
        found[hosts] = {"p10_us": p10, "median_us": median}
        table.add_row(str(hosts), f"{p10:.0f} us", f"{median:.0f} us")
    Console().print(table)
    write_json(arguments.json, found)


if __name__ == "__main__":
    main()
