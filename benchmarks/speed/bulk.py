"""Tensors of a training run between two processes, against a copy of the same bytes.

    python -m benchmarks.speed.bulk [--json PATH] [--only get|put|gradient]

The host is a process of its own. `memcpy` is torch's copy between two tensors that are in use
already, in one process with one thread; `bulk` goes through shared memory, and `grpc` is what hosts
of two nodes have. Both compute checksums on both sides. A `gradient` lies in memory that the client
lends: the host reads all of it there. Hosts and trunks have four transfers under way (`4 x`), so
that one waits for its other side while another computes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import Comparison, compare, report
from moesaic.actors.transport.bulk.lent_memory import LentMemory
from moesaic.actors.transport.bulk.links import BulkLinks
from moesaic.actors.transport.bulk.server import BulkServer
from moesaic.actors.transport.grpc.stream import GrpcListener
from moesaic.cluster.expert_keys import ExpertKey
from moesaic.cluster.placement import HostEntry
from moesaic.cluster.training.contributions import Attempt
from moesaic.cluster.training.orders import BulkKey
from moesaic.proto.keys import ClusterSecret, secret_of_process, target

# Bytes -> (rounds, calls in each).
SIZES = {"1 MB": (10**6, 20), "10 MB": (10**7, 10), "100 MB": (10**8, 3)}
# At least 40 % of the speed of a copy.
TARGET = 2.5
AT_ONCE = 4
DEADLINE_S = 60.0
_HOST, _INCARNATION = "host", 1
# Both processes are one cluster.
_SECRET = "SECRET_OF_A_BENCHMARK"


def key(nbytes: int) -> BulkKey:
    return BulkKey("weights", ExpertKey("model", 0, nbytes), version=1)


def tensors(nbytes: int) -> dict[str, Tensor]:
    """Three tensors, as an expert has them."""
    rows = nbytes // 4 // 3
    return {name: torch.ones(rows) for name in ("down", "gate", "up")}


class Store:
    def __init__(self) -> None:
        self._held = {key(size): tensors(size) for size, _ in SIZES.values()}

    def most_bytes(self, key: BulkKey) -> int:
        return 1 << 30

    @contextlib.contextmanager
    def reading(self, wanted: BulkKey) -> Iterator[Mapping[str, Tensor]]:
        yield self._held[wanted]

    def put(self, given: BulkKey, tensors: Mapping[str, Tensor]) -> None:
        self._held[given] = dict(tensors)
        if given.kind == "gradient":
            assert all(tensor.sum() > 0 for tensor in tensors.values())


def serve() -> None:
    torch.set_num_threads(1)
    secret, meant = ClusterSecret(bytes.fromhex(os.environ[_SECRET])), target(_HOST, _INCARNATION)
    store = Store()
    listener = GrpcListener(bulk=store, secret=secret, target=meant)
    server = BulkServer(store, secret=secret, target=meant)
    entry = HostEntry(
        host=_HOST,
        incarnation=_INCARNATION,
        node="here",
        shm_address="",
        grpc_address=listener.address,
        bulk_address=server.address,
    )
    print(json.dumps(asdict(entry)), flush=True)
    sys.stdin.read()
    server.close()
    listener.close()


@contextlib.contextmanager
def host() -> Iterator[HostEntry]:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.speed.bulk", "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {_SECRET: secret_of_process().reveal().hex()},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield HostEntry(**json.loads(process.stdout.readline()))
    finally:
        process.stdin.close()
        try:
            process.wait(DEADLINE_S)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def get(links: BulkLinks, entry: HostEntry, nbytes: int) -> Callable[[], None]:
    def call() -> None:
        with links.get(entry, key(nbytes), timeout_s=DEADLINE_S) as got:
            assert len(got) == 3

    return call


def put(links: BulkLinks, entry: HostEntry, nbytes: int) -> Callable[[], None]:
    given = tensors(nbytes)

    def call() -> None:
        links.put(entry, key(nbytes), given, timeout_s=DEADLINE_S)

    return call


def lend(links: BulkLinks, entry: HostEntry, nbytes: int) -> Callable[[], None]:
    memory = LentMemory(nbytes, tensors=3)
    given = memory.hold(nbytes, tensors(nbytes))
    gradient = BulkKey(
        "gradient", ExpertKey("model", 0, nbytes), attempt=Attempt(1, 0, 0), source="trunk"
    )

    def call() -> None:
        links.lend(entry, {gradient: given}, memory, timeout_s=DEADLINE_S)

    return call


DIRECTIONS = {"get": get, "put": put, "gradient": lend}


def run(only: str | None = None) -> list[Comparison]:
    torch.set_num_threads(1)
    with (
        host() as entry,
        contextlib.closing(BulkLinks("here")) as near,
        contextlib.closing(BulkLinks("elsewhere")) as far,
        ThreadPoolExecutor(AT_ONCE) as threads,
    ):
        results: list[Comparison] = []
        for direction, transfer in DIRECTIONS.items():
            for label, (nbytes, calls) in SIZES.items():
                if only not in (None, direction):
                    continue
                pairs = [(torch.ones(nbytes // 4), torch.ones(nbytes // 4)) for _ in range(AT_ONCE)]

                def memcpy(pairs: Sequence[tuple[Tensor, Tensor]] = pairs) -> None:
                    for source, copy in pairs:
                        copy.copy_(source)

                for ours, links, limit in (("bulk", near, TARGET), ("grpc", far, None)):
                    if ours == "grpc" and direction == "gradient":
                        continue  # it is put as any other tensor
                    made = [transfer(links, entry, nbytes) for _ in range(AT_ONCE)]

                    def at_once(made: Sequence[Callable[[], None]] = made) -> None:
                        for one in [threads.submit(call) for call in made]:
                            one.result()

                    for way, call, copied in (
                        (f"{AT_ONCE} x {label}", at_once, memcpy),
                        (label, made[0], partial(memcpy, pairs[:1])),
                    ):
                        results.append(
                            compare(
                                f"{direction}, {ours}, {way}",
                                {ours: call, "memcpy": copied},
                                ours=ours,
                                base="memcpy",
                                target=limit if call is at_once else None,
                                rounds=7,
                                calls=calls,
                            )
                        )
        return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=sorted(DIRECTIONS))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    report("Tensors of a training run", run(arguments.only), arguments.json)


if __name__ == "__main__":
    main()
