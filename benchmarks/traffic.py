"""Skewed traffic that shifts, from processes of its own: routers without trunks.

    python -m benchmarks.traffic ARGUMENTS     (JSON; started by `traffic`)

Popularity of a layer's experts is Zipf's: proportional to 1 / rank^exponent. Every `shift_s`
seconds a part of each layer's experts change their ranks among each other. A token picks `top_k`
different experts (Gumbel's way of drawing without replacement).

Shapes: E experts of a layer, T tokens, K assignments of a token, H hosts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moesaic
from moesaic.actors.router.pool_link import PlacementWatch
from moesaic.actors.router.router import Router
from moesaic.actors.runtime.ray_border import namespace_of
from moesaic.actors.store.cluster_secret import secret_of
from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.placement import LayerPlacement
from moesaic.cluster.planner.balance import balancedness

MODEL = "skew"
START_S = 120.0
# Drawn to find out how loads come out.
_SAMPLES = 4096


@dataclass(frozen=True, kw_only=True)
class Traffic:
    layers: int
    experts: int
    top_k: int
    tokens: int  # of one call
    hidden: int
    exponent: float = 0.0  # 0: all experts are alike
    part: float = 0.25  # of the experts that change ranks in a shift
    shift_s: float = 20.0
    shifts: int = 0  # and no more
    seed: int = 0

    def shift_at(self, seconds: float) -> int:
        return min(int(max(0.0, seconds) / self.shift_s), self.shifts)

    def log_popularity(self, layer: int, shift: int) -> np.ndarray:
        """(E,), unnormalised."""
        rng = np.random.default_rng((self.seed, layer))
        rank_E = rng.permutation(self.experts)
        for _ in range(shift):
            some = rng.choice(self.experts, max(2, int(self.part * self.experts)), replace=False)
            rank_E[some] = rank_E[rng.permutation(some)]
        return -self.exponent * np.log1p(rank_E)

    def draw(self, log_E: np.ndarray, tokens: int, rng: np.random.Generator) -> np.ndarray:
        """(T, K) int32 different experts of each token."""
        keys_TE = log_E + rng.gumbel(size=(tokens, self.experts))
        chosen = np.argpartition(-keys_TE, self.top_k - 1, axis=1)[:, : self.top_k]
        return chosen.astype(np.int32)

    def load(self, layer: int, shift: int) -> np.ndarray:
        """(E,): assignments of a sample."""
        rng = np.random.default_rng((self.seed, 1, layer, shift))
        ids = self.draw(self.log_popularity(layer, shift), _SAMPLES, rng)
        return np.bincount(ids.reshape(-1), minlength=self.experts)


def balance_of(traffic: Traffic, placed: Mapping[LayerKey, LayerPlacement]) -> float:
    """Balancedness of the traffic under fixed shares, in the mean over layers and shifts."""
    hosts = sorted({r.host for layer in placed.values() for e in layer.replicas for r in e})
    share = {
        key: np.array([[dict(e).get(host, 0.0) for host in hosts] for e in layer.replicas])
        for key, layer in placed.items()
    }
    speed_H = np.ones(len(hosts))
    return float(
        np.mean(
            [
                balancedness(traffic.load(key.layer, shift) @ share_EH, speed_H)
                for key, share_EH in share.items()
                for shift in range(traffic.shifts + 1)
            ]
        )
    )


def exponent_for(
    target: float,
    make: Callable[[float], Traffic],
    placed: Mapping[LayerKey, LayerPlacement],
) -> float:
    """The skew at which fixed shares have balancedness ``target``, by bisection. Raises ValueError
    where none has it."""
    low, high = 0.0, 4.0
    reached = balance_of(make(high), placed)
    if reached > target:
        raise ValueError(
            f"balancedness: no skew brings it below {reached:.2f}, and {target} is asked for; take "
            "more hosts, more experts, or fewer assignments of a token"
        )
    for _ in range(12):
        middle = (low + high) / 2
        above = balance_of(make(middle), placed) > target
        low, high = (middle, high) if above else (low, middle)
    return (low + high) / 2


# ---- processes ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """Passes through all layers: when each began and ended (monotonic clock)."""

    began: np.ndarray
    ended: np.ndarray
    call_s: np.ndarray  # (steps, layers)

    def within(self, began: float, ended: float) -> Steps:
        """Those that ended in an interval."""
        chosen = (self.ended >= began) & (self.ended < ended)
        return Steps(self.began[chosen], self.ended[chosen], self.call_s[chosen])

    def rate(self, began: float, ended: float) -> float:
        """Passes per second in an interval; those that overlap its ends count in part."""
        overlap_s = np.minimum(self.ended, ended) - np.maximum(self.began, began)
        parts = np.maximum(overlap_s, 0.0) / (self.ended - self.began)
        return float(parts.sum() / (ended - began))

    def rates(self, began: float, ended: float, bucket_s: float) -> list[float]:
        """The same for each bucket of an interval, as many as fit."""
        starts = began + bucket_s * np.arange(int((ended - began) / bucket_s + 1e-9))
        return [self.rate(start, start + bucket_s) for start in starts.tolist()]


class Drivers:
    """Router processes at work."""

    def __init__(self, processes: Sequence[subprocess.Popen[str]], files: Sequence[Path]) -> None:
        self._processes, self._files = processes, files

    def start(self) -> float:
        """Let the traffic begin; gives the moment from which shifts are counted."""
        began = time.monotonic()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{began}\n")
            process.stdin.flush()
        return began

    def check(self) -> None:
        for process in self._processes:
            if process.poll() is not None:
                raise RuntimeError(f"a router process ended with {process.returncode}")

    def stop(self) -> Steps:
        """All steps of all of them."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            if process.wait(60):
                raise RuntimeError(f"a router process ended with {process.returncode}")
        found = [np.load(file) for file in self._files]
        return Steps(*(np.concatenate([f[n] for f in found]) for n in ("began", "ended", "call_s")))


@contextmanager
def driving(cluster: str, traffic: Traffic, *, routers: int, folder: Path) -> Iterator[Drivers]:
    """``routers`` processes, each with one call at a time, ready to begin."""
    with ExitStack() as stack:
        processes, files = [], []
        for index in range(routers):
            files.append(folder / f"steps-{os.getpid()}-{index}.npz")
            arguments = {
                "cluster": cluster, "index": index, "file": str(files[-1]),
                "traffic": asdict(traffic),
            }  # fmt: skip
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.traffic", json.dumps(arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
            )
            stack.callback(_end, process)
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError("a router process did not come up")
        yield Drivers(processes, files)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait(20)


def main(arguments: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    traffic = Traffic(**arguments["traffic"])
    cluster = moesaic.connect(arguments["cluster"])
    node = next(iter(cluster.status().processes.values())).node
    namespace = namespace_of(arguments["cluster"])
    router = Router(name=f"traffic-{arguments['index']}", node=node, secret=secret_of(namespace))
    watch = PlacementWatch(namespace, router)
    stop = threading.Event()
    try:
        keys = [LayerKey(MODEL, layer) for layer in range(traffic.layers)]
        router.wait_ready(START_S, keys)
        print("ready", flush=True)
        began = float(sys.stdin.readline())
        threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
        steps = _drive(router, traffic, arguments["index"], began, stop)
    finally:
        watch.close()
        router.close()
    np.savez(
        arguments["file"],
        began=np.array([began for began, _, _ in steps]),
        ended=np.array([ended for _, ended, _ in steps]),
        call_s=np.array([calls for _, _, calls in steps]).reshape(len(steps), traffic.layers),
    )


def _drive(
    router: Router, traffic: Traffic, index: int, began: float, stop: threading.Event
) -> list[tuple[float, float, list[float]]]:
    rng = np.random.default_rng((traffic.seed, 2, index))
    x_TH = torch.randn(traffic.tokens, traffic.hidden, generator=torch.Generator().manual_seed(0))
    weights_TK = torch.full((traffic.tokens, traffic.top_k), 1 / traffic.top_k)
    popularity: dict[tuple[int, int], np.ndarray] = {}
    steps = []
    while not stop.is_set():
        start, calls = time.monotonic(), []
        shift = traffic.shift_at(start - began)
        for layer in range(traffic.layers):
            if (layer, shift) not in popularity:
                popularity[layer, shift] = traffic.log_popularity(layer, shift)
            ids_TK = torch.from_numpy(traffic.draw(popularity[layer, shift], traffic.tokens, rng))
            asked = time.monotonic()
            router.forward(LayerKey(MODEL, layer), x_TH, ids_TK, weights_TK)
            calls.append(time.monotonic() - asked)
        steps.append((start, time.monotonic(), calls))
    return steps


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    # The watch's thread may still wait for the controller, which Ray's own exit takes for a crash.
    os._exit(0)
