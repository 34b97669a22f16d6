"""Throughput while one host of N is dead, frozen or ten times slower, on emulated devices.

    python -m benchmarks.resilience.faults_throughput [--json PATH] [--hosts N] [--rounds N] ...

Every expert has a replica on another host; traffic prefers none. Quiet rounds and rounds with a
fault take turns; a fault begins with its round. A killed host is gone until the process that Ray
starts in its place reports; a frozen one for `--harm` seconds; a slow one keeps a tenth of its
speed for as long. So the lost capacity of a round is known: the host-seconds that were lost, as a
part of all. Were the load spread perfectly over what is left at every moment, the throughput would
lose the same part; `beyond` is what is lost besides.

A pass is all layers, one after the other, as a token's; each layer waits for its busiest host, in
quiet rounds too. A run in which hosts overran their emulated time is not valid; overruns of a host
while it is harmed do not count, since being stopped is one.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from rich.console import Console
from rich.table import Table

import moesaic
from benchmarks.measure import write_json
from benchmarks.random_model import EXPERT_BYTES, HIDDEN, save_random_model
from benchmarks.traffic import MODEL, Drivers, Steps, Traffic, driving
from moesaic.actors.runtime.ray_border import namespace_of
from moesaic.cluster.host.emulation import Emulation
from moesaic.handle import Cluster

KINDS = ("kill", "freeze", "slow")
SLOW = 10.0
# What may be lost beyond the lost capacity.
TARGET = 0.02
WHOLE_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Round:
    kind: str
    host: str
    began: float
    ended: float
    lost_s: float  # host-seconds
    overruns: int


# ---- harm ---------------------------------------------------------------------------------------


class Pool:
    """A cluster under traffic, and what is done to it."""

    def __init__(self, cluster: Cluster, drivers: Drivers, emulated: Emulation) -> None:
        self._cluster, self._drivers, self._emulated = cluster, drivers, emulated

    def quiet(self, seconds: float) -> Round:
        return self._round("quiet", "", seconds, seconds, 0.0)

    def harmed(self, kind: str, host: str, seconds: float, harm_s: float) -> Round:
        """A round that begins with the harm."""
        lost = 1 - 1 / SLOW if kind == "slow" else 1.0
        return self._round(kind, host, seconds, harm_s, lost)

    def wait_whole(self) -> list[str]:
        """Until all hosts are up and nothing is to be loaded; gives their names."""
        deadline = time.monotonic() + WHOLE_S
        while True:
            status = self._cluster.status()
            up = all(host.state == "up" for host in status.hosts)
            whole = not status.unprotected_experts and not status.balancing.pending_moves
            if up and whole:
                return sorted(host.name for host in status.hosts)
            if time.monotonic() > deadline:
                raise RuntimeError(f"the pool is not whole after {WHOLE_S:g} s: {status.hosts}")
            self.sleep(0.2)

    def sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left_s := until - time.monotonic()) > 0:
            time.sleep(min(left_s, 1.0))
            self._drivers.check()

    def _round(self, kind: str, host: str, seconds: float, harm_s: float, lost: float) -> Round:
        before = self._cluster.status().processes
        began = time.monotonic()
        if kind == "kill":
            pid = before[host].pid
            os.kill(pid, signal.SIGKILL)
            harm_s = self._until_back(host, pid, began + seconds)
        elif kind != "quiet":
            with self._frozen(before[host].pid) if kind == "freeze" else self._slow(host):
                self.sleep(harm_s)
                harm_s = time.monotonic() - began
        self.sleep(began + seconds - time.monotonic())
        ended, after = time.monotonic(), self._cluster.status().processes
        overruns = [
            after[name].overrun_batches - before[name].overrun_batches
            for name in after
            if name != host
        ]
        return Round(
            kind=kind,
            host=host,
            began=began,
            ended=ended,
            lost_s=lost * harm_s,
            overruns=sum(overruns),
        )

    def _until_back(self, host: str, pid: int, until: float) -> float:
        """Seconds until a killed host's successor reports."""
        began = time.monotonic()
        while time.monotonic() < until:
            (known,) = (one for one in self._cluster.status().hosts if one.name == host)
            if known.state == "up" and known.process is not None and known.process.pid != pid:
                break
            self.sleep(0.2)
        return time.monotonic() - began

    @contextmanager
    def _frozen(self, pid: int) -> Iterator[None]:
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    @contextmanager
    def _slow(self, host: str) -> Iterator[None]:
        slower = {name: SLOW * us for name, us in asdict(self._emulated).items()}
        self._emulate(host, Emulation(**slower))
        try:
            yield
        finally:
            self._emulate(host, self._emulated)

    def _emulate(self, host: str, device: Emulation) -> None:
        actor: Any = ray.get_actor(host, namespace=namespace_of(self._cluster.name))
        ray.get(actor.emulate.remote(device), timeout=60)


def run(pool: Pool, given: argparse.Namespace) -> list[Round]:
    rng = np.random.default_rng(given.seed)
    kinds = rng.permutation([kind for kind in given.kinds for _ in range(given.rounds)]).tolist()
    pool.sleep(given.warm)
    rounds = []
    for kind in kinds:
        rounds.append(pool.quiet(given.seconds))
        host = str(rng.choice(pool.wait_whole()))
        rounds.append(pool.harmed(kind, host, given.seconds, given.harm))
        print(f"{kind} {host}: {rounds[-1].lost_s:.1f} host-seconds lost", flush=True)
        pool.wait_whole()
        pool.sleep(given.rest)
    return rounds


# ---- figures ------------------------------------------------------------------------------------


def figures(
    rounds: Sequence[Round], steps: Steps, *, tokens: int, hosts: int
) -> list[dict[str, Any]]:
    """For each round: tokens/s, its part of the quiet round before it, and what is lost."""
    found, quiet = [], float("nan")
    for one in rounds:
        seconds = one.ended - one.began
        rate = tokens * steps.rate(one.began, one.ended)
        quiet = rate if one.kind == "quiet" else quiet
        part, lost = rate / quiet, one.lost_s / (hosts * seconds)
        by_second = [round(tokens * rate) for rate in steps.rates(one.began, one.ended, 1.0)]
        found.append(
            asdict(one)
            | {"tokens_per_s": rate, "part_of_quiet": part, "lost_capacity": lost}
            | {"beyond": 1 - part - lost, "by_second": by_second}
        )
    return found


def by_kind(rounds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds of each kind."""
    names = ("tokens_per_s", "part_of_quiet", "lost_capacity", "beyond")
    kinds = dict.fromkeys(one["kind"] for one in rounds)
    return {
        kind: {"rounds": sum(one["kind"] == kind for one in rounds)}
        | {name: float(np.median([r[name] for r in rounds if r["kind"] == kind])) for name in names}
        for kind in kinds
    }


def show(found: Mapping[str, Any]) -> None:
    table = Table(title="One host harmed, medians over rounds")
    for column in ("", "rounds", "tokens/s", "of quiet", "lost capacity", "lost beyond", "target"):
        table.add_column(column, justify="right" if column else "left")
    for kind, row in found["kinds"].items():
        quiet = kind == "quiet"
        table.add_row(
            kind,
            str(row["rounds"]),
            f"{row['tokens_per_s']:,.0f}",
            "" if quiet else f"{row['part_of_quiet']:.1%}",
            "" if quiet else f"{row['lost_capacity']:.1%}",
            "" if quiet else f"{row['beyond']:.1%}",
            "" if quiet else f"{TARGET:.0%}",
        )
    Console(width=100).print(table)
    if not found["valid"]:
        print(f"NOT VALID: {found['overruns']} batches overran their emulated time; take a slower")
        print("device (--row-us) or fewer hosts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of one call")
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--call-us", type=float, default=1000)
    parser.add_argument("--row-us", type=float, default=200)
    parser.add_argument("--rounds", type=int, default=3, help="of each kind of fault")
    parser.add_argument("--seconds", type=float, default=60, help="of one round")
    parser.add_argument("--harm", type=float, default=30, help="seconds frozen or slow")
    parser.add_argument("--warm", type=float, default=20)
    parser.add_argument("--rest", type=float, default=10, help="seconds behind each fault's round")
    parser.add_argument("--every", type=float, default=5, help="seconds between two balancings")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    emulated = Emulation(call_us=given.call_us, row_us=given.row_us)
    traffic = Traffic(
        layers=given.layers,
        experts=given.experts,
        top_k=given.top_k,
        tokens=given.tokens,
        hidden=HIDDEN,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_random_model(
            folder / "model", layers=given.layers, experts=given.experts, top_k=given.top_k
        )
        spec = {
            "name": f"faults-throughput-{os.getpid()}",
            "models": [{"name": MODEL, "path": str(folder / "model")}],
            "hosts": [{"count": given.hosts, "device": "cpu", "emulate": asdict(emulated)}],
            "endpoint": None,
            "balance": {
                "redundancy": 1,
                "every_s": given.every,
                # 50 ms for one expert, in the background.
                "load_mb_per_s": EXPERT_BYTES / 0.05 / 1e6,
            },
        }
        with (
            moesaic.up(spec) as cluster,
            driving(cluster.name, traffic, routers=given.routers, folder=folder) as drivers,
        ):
            pool = Pool(cluster, drivers, emulated)
            pool.wait_whole()
            drivers.start()
            done = run(pool, given)
            steps = drivers.stop()
    rounds = figures(done, steps, tokens=given.tokens, hosts=given.hosts)
    overruns = sum(one.overruns for one in done)
    found = {
        "title": "throughput under faults",
        "setting": vars(given),
        "valid": not overruns,
        "overruns": overruns,
        "kinds": by_kind(rounds),
        "rounds": rounds,
    }
    show(found)
    write_json(given.json, found)


if __name__ == "__main__":
    main()
