"""A thousand strangers at once at a host that serves an honest router.

    python -m benchmarks.resilience.strangers [--json PATH]

A fifth each: TCP connections that say nothing, HTTP/2 connections that say nothing, and three that
go on as far as they can: half a Hello, a proof that is wrong, and weights of 400 MB for an expert
of a few kilobytes. Those of half a Hello and of the weights show what a member of the cluster has,
proof and grant, as if one had gone mad. Each comes again a moment after the host has ended it, for
as long as the router is measured, from a process of their own and with less claim to the cores, as
if they were on another machine. The router calls one layer of a tiny model over gRPC, one call
after the other; rounds with strangers and without take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.hosts import NODE, HostProcess, host_processes, place
from benchmarks.measure import write_json
from benchmarks.random_model import HIDDEN, save_random_model
from moesaic.actors.router.router import Router
from moesaic.cluster.expert_keys import ExpertKey, LayerKey
from moesaic.cluster.placement import HostEntry, ModelRef
from moesaic.proto.expert_pb2 import WeightsChunk, WeightsKey
from moesaic.proto.keys import proof_hash, secret_of_process
from moesaic.proto.limits import CHUNK_BYTES

MODEL, EXPERTS, TOP_K, TOKENS = "m", 8, 2, 8
KINDS = ("silent TCP", "silent HTTP/2", "half a Hello", "wrong proof", "oversized Put")
WORST_RATIO, MOST_GROWTH_MB = 2.0, 64.0
# A stranger that was ended comes again so much later.
PAUSE_S = 1.0
DISPATCH, PUT = "/moesaic.v1.Experts/Dispatch", "/moesaic.v1.Weights/Put"
# An HTTP/2 client's preface, its empty settings, and that it has heard the server's.
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0" + b"\0\0\0\4\1\0\0\0\0"
_DATA, _HEADERS, _END_HEADERS = 0, 1, 4


# ---- what strangers say --------------------------------------------------------------------------


def frame(kind: int, flags: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags, 0, 0, 0, 1]) + payload


def headers(path: str, **metadata: str) -> bytes:
    """The beginning of an RPC; each header is a literal (RFC 7541, 6.2.2)."""
    given = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "host",
        "content-type": "application/grpc",
        "te": "trailers",
    } | {name.replace("_", "-"): value for name, value in metadata.items()}
    block = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in given.items()
    )
    return frame(_HEADERS, _END_HEADERS, block)


def message(data: bytes, announced: int | None = None) -> bytes:
    """A gRPC message in frames of 16 KiB, as they are unless somebody asks for larger ones."""
    whole = struct.pack(">?I", False, announced or len(data)) + data
    size = 16 << 10
    return b"".join(frame(_DATA, 0, whole[i : i + size]) for i in range(0, len(whole), size))


def sayings(entry: HostEntry) -> dict[str, str]:
    """For each kind of stranger what it says, in hexadecimal."""
    secret = secret_of_process()

    def text(proof: bytes) -> str:
        return base64.b64encode(proof).decode().rstrip("=")

    key = ExpertKey(MODEL, 0, 0)
    chunk = WeightsChunk(
        key=WeightsKey(model=MODEL, layer=0, expert=0, version=1),
        total_bytes=400 << 20,
        data=bytes(CHUNK_BYTES // 16),
    )
    said = {
        "silent TCP": b"",
        "silent HTTP/2": HELLO,
        "half a Hello": HELLO
        + headers(
            DISPATCH, moesaic_proof_bin=text(proof_hash(secret.proof("experts", entry.target)))
        )
        + message(b"\x0a\x40", CHUNK_BYTES),
        "wrong proof": HELLO + headers(DISPATCH, moesaic_proof_bin=text(bytes(32))) + message(b""),
        "oversized Put": HELLO
        + headers(
            PUT,
            moesaic_proof_bin=text(proof_hash(secret.proof("weights", entry.target))),
            moesaic_term="0",
            moesaic_grant_bin=text(secret.grant(entry.host, entry.incarnation, key, 1, 0)),
        )
        + message(chunk.SerializeToString()),
    }
    return {kind: said[kind].hex() for kind in KINDS}


async def stranger(ip: str, port: int, says: bytes, kind: str, came: Counter[str]) -> None:
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(ip, port)
            came[kind] += 1
            try:
                writer.write(says)
                while await reader.read(1 << 14):
                    pass
            finally:
                writer.close()
        await asyncio.sleep(PAUSE_S)


async def be_strangers(address: str, says: dict[str, str], count: int) -> None:
    """Until standard input ends."""
    ip, _, port = address.rpartition(":")
    came: Counter[str] = Counter()
    tasks = [
        asyncio.create_task(stranger(ip, int(port), bytes.fromhex(says[kind]), kind, came))
        for kind in KINDS
        for _ in range(count // len(KINDS))
    ]
    await asyncio.sleep(0.5)
    print("here", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for task in tasks:
        task.cancel()
    print(json.dumps(came), flush=True)


@contextmanager
def strangers(entry: HostEntry, count: int, came: Counter[str]) -> Iterator[None]:
    command = [sys.executable, "-m", "benchmarks.resilience.strangers", "--be", entry.grpc_address]
    process = subprocess.Popen(
        [*command, "--count", str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.nice(15),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(sayings(entry)) + "\n")
        process.stdin.flush()
        process.stdout.readline()
        yield
        process.stdin.close()
        came.update(json.loads(process.stdout.readline() or "{}"))
    finally:
        process.kill()
        process.wait(20)
        process.stdout.close()


# ---- the honest router ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    p50_s: float
    p99_s: float
    slowest_s: float
    calls: int
    rss_mb: float  # the most that the host had


def measured(router: Router, host: HostProcess, seconds: float) -> Round:
    process = psutil.Process(host.process.pid)
    given = (
        torch.randn(TOKENS, HIDDEN),
        torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(TOKENS)]),
        torch.rand(TOKENS, TOP_K),
    )
    key = LayerKey(MODEL, 0)
    wanted = router.forward(key, *given)
    took_s, rss = [], process.memory_info().rss
    until = looked_at = time.perf_counter() + seconds
    while (now := time.perf_counter()) < until:
        answer = router.forward(key, *given)
        took_s.append(time.perf_counter() - now)
        assert torch.equal(answer, wanted), "an answer has changed"
        if abs(now - looked_at) > 0.1:
            looked_at, rss = now, max(rss, process.memory_info().rss)
    p50_s, p99_s = np.percentile(took_s, [50, 99])
    return Round(
        p50_s=float(p50_s),
        p99_s=float(p99_s),
        slowest_s=max(took_s),
        calls=len(took_s),
        rss_mb=rss / 1e6,
    )


def measure(count: int, rounds: int, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    came: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, host_processes(1, threads=1) as (host,):
        save_random_model(Path(folder), layers=1, experts=EXPERTS, top_k=TOP_K)
        placement = place([host], ModelRef(name=MODEL, dtype="float32", path=folder), {0: EXPERTS})
        router = Router(name="honest", node=NODE, transport="grpc")
        router.place(placement)
        router.wait_ready(30.0)
        measured(router, host, 2.0)
        quiet, loud = [], []
        for _ in range(rounds):
            quiet.append(measured(router, host, seconds))
            with strangers(host.entry, count, came):
                loud.append(measured(router, host, seconds))
        retries = router.stats().retries
        router.close()
    ratio = statistics.median(b.p99_s / a.p99_s for a, b in zip(quiet, loud, strict=True))
    growth_mb = max(each.rss_mb for each in loud) - quiet[0].rss_mb
    return {
        "strangers": count,
        "came": dict(came),
        "quiet": _medians(quiet),
        "with_strangers": _medians(loud),
        "p99_ratio": ratio,
        "growth_mb": growth_mb,
        "retries": retries,
        "met": ratio <= WORST_RATIO and growth_mb <= MOST_GROWTH_MB and not retries,
    }


def _medians(rounds: list[Round]) -> dict[str, float]:
    return {
        name: statistics.median(getattr(each, name) for each in rounds) for name in Round.__slots__
    }


def show(found: dict[str, Any]) -> None:
    table = Table(title=f"{found['strangers']} strangers at once, and an honest router over gRPC")
    for column in ("", "quiet", "with strangers"):
        table.add_column(column, justify="left" if not column else "right")
    for name, said, scale in (
        ("p50_s", "p50, ms", 1e3),
        ("p99_s", "p99, ms", 1e3),
        ("slowest_s", "slowest, ms", 1e3),
        ("calls", "calls", 1),
        ("rss_mb", "host's memory, MB", 1),
    ):
        values = (found[when][name] * scale for when in ("quiet", "with_strangers"))
        table.add_row(said, *(f"{value:,.1f}" for value in values))
    colour = "green" if found["met"] else "red"
    table.add_row("p99, ratio", "", f"[{colour}]{found['p99_ratio']:.2f}[/]")
    table.add_row("growth, MB", "", f"[{colour}]{found['growth_mb']:.1f}[/]")
    table.add_row("strangers that came", "", f"{sum(found['came'].values()):,}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--be", metavar="ADDRESS", help="be the strangers; used by the benchmark")
    given = parser.parse_args()
    if given.be:
        asyncio.run(be_strangers(given.be, json.loads(sys.stdin.readline()), given.count))
        return
    found = measure(given.count, given.rounds, given.seconds)
    show(found)
    write_json(given.json, {"title": "strangers", **found})


if __name__ == "__main__":
    main()
