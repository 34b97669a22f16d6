"""Training with hot experts: the planner's replicas on, and off, and tokens dealt evenly.

    python -m benchmarks.elasticity.training_replicas [--json PATH] [--hosts N] [--rounds N] ...

Hosts emulate a device, which takes a stated time for each assignment; processes, transport and
arithmetic are real. Gates are dealt: a hook in the trunk gives each token its experts, from Zipf's
law with a seed, and so all ways compute the same step with the same assignments. The exponent is
searched at which the first placement, with one replica of each expert, has balancedness 0.5: the
busiest host has twice the mean. Two clusters take turns:

- `balanced`: the first placement, with tokens dealt evenly to experts; this is the baseline;
- `off`: the same cluster with dealt skew;
- `on`: a cluster of its own with the same skew, whose planner has replicated and moved experts in
  steps before, until it has nothing left to do.

A run in which hosts overran their emulated time is not valid, and says so.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.utils import logging as transformers_logging

import moesaic
from benchmarks.measure import write_json
from benchmarks.traffic import Traffic, exponent_for
from benchmarks.training_load import LEARNING_RATE, TrainingLoad, add_options, backward, load_of
from moesaic.actors.runtime.ray_border import controller_of, namespace_of, ray_get
from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.load.meter import LoadReport
from moesaic.cluster.placement import LayerPlacement
from moesaic.handle import Cluster

BALANCEDNESS = 0.5
OFF_TARGET, BALANCED_TARGET = 1.5, 0.94
# Until a placement has settled: so long without a move, and so much time in all.
QUIET_S, SETTLE_S = 15.0, 240.0
START_S = 300.0


class DealtGates:
    """Gives each token its experts, whatever the gates of a trunk have chosen.

    The gates' own probabilities weigh them, so gates have gradients.
    Shapes: E experts of a layer, T tokens, K assignments of a token.
    """

    def __init__(self, model: Any, traffic: Traffic) -> None:
        self.traffic = traffic
        self.even = False
        self.step = 0  # which decides the experts
        self._calls = [0] * traffic.layers  # of each layer in the step
        for number, layer in enumerate(model.model.layers):
            layer.mlp.gate.register_forward_hook(
                lambda _gate, _given, found, number=number: self._deal(number, *found)
            )

    def begin(self, step: int) -> None:
        self.step, self._calls = step, [0] * self.traffic.layers

    def _deal(
        self, layer: int, logits_TE: Tensor, _weights_TK: Tensor, _ids_TK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ids_TK = torch.from_numpy(self.ids(layer, self._calls[layer], len(logits_TE)))
        self._calls[layer] += 1
        chosen_TK = logits_TE.float().softmax(-1).gather(1, ids_TK)
        return logits_TE, chosen_TK / chosen_TK.sum(-1, keepdim=True), ids_TK

    def ids(self, layer: int, call: int, tokens: int) -> np.ndarray:
        """(T, K) int64 experts of the tokens of a microbatch."""
        given = self.traffic
        if self.even:
            begin = call * tokens * given.top_k
            dealt = np.arange(begin, begin + tokens * given.top_k) % given.experts
            return dealt.reshape(tokens, given.top_k)
        rng = np.random.default_rng((given.seed, 3, self.step, layer, call))
        return given.draw(given.log_popularity(layer, 0), tokens, rng).astype(np.int64)


class Trainee:
    """A cluster with a model that is trained, and its trunk in this process."""

    def __init__(
        self,
        cluster: Cluster,
        model: Any,
        optimizer: moesaic.PoolOptimizer,
        load: TrainingLoad,
        traffic: Traffic,
    ) -> None:
        self.cluster = cluster
        self.gates = DealtGates(model, traffic)
        self._model, self._optimizer, self._load = model, optimizer, load

    def step(self, number: int) -> None:
        """Make a step with the microbatches and the assignments of this number."""
        self.gates.begin(number)
        _, targets = backward(self._model, self._load.step(number))
        self._optimizer.step(weight=targets)

    def steps_per_s(self, first: int, count: int, *, even: bool = False) -> float:
        self.gates.even = even
        began = time.perf_counter()
        for number in range(first, first + count):
            self.step(number)
        return count / (time.perf_counter() - began)

    def settle(self) -> float:
        """Make steps until the planner moves nothing any more; return for how long."""
        began = changed = time.monotonic()
        known, number = -1, 0
        while time.monotonic() - changed < QUIET_S:
            self.step(number)
            number += 1
            moved = sum(self.moves())
            if moved != known or self.cluster.status().balancing.pending_moves:
                known, changed = moved, time.monotonic()
            if time.monotonic() - began > SETTLE_S:
                raise RuntimeError(f"the planner still moves experts after {SETTLE_S:g} s")
        return time.monotonic() - began

    def moves(self) -> list[int]:
        """Return the moves of each change of the planner."""
        changes = self.cluster.history()
        return [change.total_moves for change in changes if change.initiator == "balancer"]

    def overruns(self) -> int:
        processes = self.cluster.status().processes.values()
        return sum(process.overrun_batches for process in processes)

    def placed(self) -> dict[LayerKey, LayerPlacement]:
        controller = controller_of(namespace_of(self.cluster.name))
        asked = controller.report.remote(LoadReport(router="benchmark", placement_id=None), 5.0)
        return ray_get(asked, 30.0, "the placement").layers

    def balancedness(self, steps: int) -> float:
        """Mean load of a host / that of the busiest, in the mean over layers and steps.

        A router may level a call over replicas; here each has its fixed share.
        """
        load, found = self._load, []
        tokens = load.sequences * load.length
        self.gates.even = False
        for key, layer in self.placed().items():
            hosts = sorted({one.host for expert in layer.replicas for one in expert})
            share_EH = np.array(
                [[dict(expert).get(host, 0.0) for host in hosts] for expert in layer.replicas]
            )
            for number in range(steps):
                self.gates.begin(number)
                ids = [self.gates.ids(key.layer, n, tokens) for n in range(load.microbatches)]
                counts_E = np.bincount(np.concatenate(ids).reshape(-1), minlength=load.experts)
                load_H = counts_E @ share_EH
                found.append(load_H.mean() / load_H.max())
        return float(np.mean(found))


@contextmanager
def trainee(
    given: argparse.Namespace, folder: Path, traffic: Traffic, *, auto: bool
) -> Iterator[Trainee]:
    load = load_of(given)
    slots = int(np.ceil(given.headroom * load.experts / given.hosts)) * load.layers
    emulate = {"call_us": given.call_us, "row_us": given.row_us}
    spec = {
        "name": f"replicas-{'on' if auto else 'off'}-{os.getpid()}",
        "models": [{"name": "m", "path": str(folder), "dtype": "float32", "train": True}],
        "hosts": [
            {
                "count": given.hosts,
                "device": "cpu",
                # Both clusters are on one Ray, which was started with the CPUs of the first.
                "num_cpus": 0.1,
                "slots": slots,
                "emulate": emulate,
            }
        ],
        "network": {"lending": "never"},
        "endpoint": None,
        "balance": {
            "auto": auto,
            "every_s": given.every,
            "budget": 1.0,
            # Many hosts start slowly on few cores, and some have no room for the others' experts.
            "host_timeout_s": START_S,
        },
    }
    with moesaic.up(spec) as cluster:
        model = cluster.from_pretrained("m", train=True)
        with moesaic.PoolOptimizer(model, cluster, lr=LEARNING_RATE) as optimizer:
            yield Trainee(cluster, model, optimizer, load, traffic)


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    load = load_of(given)
    even = Traffic(
        layers=load.layers,
        experts=load.experts,
        top_k=load.top_k,
        tokens=load.tokens,
        hidden=load.hidden,
    )
    with trainee(given, folder, even, auto=False) as static:
        exponent = exponent_for(
            BALANCEDNESS, lambda found: replace(even, exponent=found), static.placed()
        )
        skewed = replace(even, exponent=exponent)
        static.gates.traffic = skewed
        with trainee(given, folder, skewed, auto=True) as planned:
            settled_s = planned.settle()
            static.step(0)  # the optimizer's state is made
            before = static.overruns() + planned.overruns()
            rates: dict[str, list[float]] = {"balanced": [], "off": [], "on": []}
            for number in range(given.rounds):
                first = number * given.steps
                rates["balanced"].append(static.steps_per_s(first, given.steps, even=True))
                rates["off"].append(static.steps_per_s(first, given.steps))
                rates["on"].append(planned.steps_per_s(first, given.steps))
            return {
                "exponent": exponent,
                "balancedness": {
                    "off": static.balancedness(given.rounds * given.steps),
                    "on": planned.balancedness(given.rounds * given.steps),
                },
                "settled_s": settled_s,
                "moves": planned.moves(),
                "overruns": static.overruns() + planned.overruns() - before,
                "steps_per_s": rates,
            }


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Medians, and ratios within a round."""
    rates = found["steps_per_s"]

    def ratio(way: str, base: str) -> float:
        pairs = zip(rates[way], rates[base], strict=True)
        return statistics.median(one / other for one, other in pairs)

    off, balanced = ratio("on", "off"), ratio("on", "balanced")
    return {
        "medians": {way: statistics.median(each) for way, each in rates.items()},
        "of_balanced": {way: ratio(way, "balanced") for way in rates},
        "of_off": {way: ratio(way, "off") for way in rates},
        "targets": {"on / off": OFF_TARGET, "on / balanced": BALANCED_TARGET},
        "met": off >= OFF_TARGET and balanced >= BALANCED_TARGET,
        "valid": not found["overruns"],
    }


def show(found: dict[str, Any]) -> None:
    table = Table(title=f"Training with hot experts, exponent {found['exponent']:.2f}")
    for column in ("", "balancedness", "steps/s", "of balanced", "of off"):
        table.add_column(column, justify="right" if column else "left")
    titles = {"balanced": "tokens dealt evenly", "off": "replicas off", "on": "replicas on"}
    for way, title in titles.items():
        balancedness = found["balancedness"].get(way)
        table.add_row(
            title,
            "" if balancedness is None else f"{balancedness:.2f}",
            f"{found['medians'][way]:.3f}",
            f"{found['of_balanced'][way]:.1%}",
            f"{found['of_off'][way]:.2f}",
        )
    table.caption = f"targets with replicas on: {BALANCED_TARGET:.0%} and {OFF_TARGET:.2f}"
    Console().print(table)
    moves = ", ".join(map(str, found["moves"])) or "none"
    print(f"moves of the planner: {moves}; settled after {found['settled_s']:.0f} s")
    if not found["valid"]:
        print(f"NOT VALID: {found['overruns']} batches overran; take a larger --row-us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--headroom", type=float, default=1.5, help="slots / experts")
    parser.add_argument("--call-us", type=float, default=2000)
    parser.add_argument("--row-us", type=float, default=500, help="of one assignment")
    parser.add_argument("--every", type=float, default=3, help="seconds between two balancings")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="of one turn")
    sizes = TrainingLoad(
        layers=2,
        experts=16,
        hidden=64,
        intermediate=64,
        vocabulary=256,
        heads=2,
        # One large microbatch: hosts are waited for in each of its calls.
        microbatches=1,
        sequences=8,
        length=128,
    )
    add_options(parser, sizes)
    given = parser.parse_args()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load_of(given).save(folder)
        found = measure(given, folder)
    found |= summary(found)
    show(found)
    write_json(given.json, {"title": "training replicas", "setting": vars(given), **found})


if __name__ == "__main__":
    main()
