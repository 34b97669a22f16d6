"""A training step with a trunk and two hosts on one card, against the same model whole on the card.

    python -m benchmarks.card.training [--device cpu] [--json PATH]

The model has one layer, that of Qwen3-30B-A3B: 128 experts of 768 x 2048, top-8, bfloat16. A step
is forward, backward, clipping and AdamW. The pool keeps masters in float32; the model in process
(transformers' grouped_mm, torch's fused AdamW) has none, so its update moves less. It needs what
hosts and routers need, and no Ray. On a CPU the model is tiny, to show that all of it works.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks.hosts import NODE, HostProcess, host_processes, place
from benchmarks.measure import write_json
from benchmarks.random_model import save_random_model
from moesaic.actors.router.router import Router
from moesaic.actors.training.lead.coordinator import Coordinator
from moesaic.actors.training.learning import Learning
from moesaic.actors.training.opening import plan_run
from moesaic.actors.training.optimizer import RunOptimizer
from moesaic.actors.training.run import LearningTrunk, PoolRun
from moesaic.actors.transport.bulk.links import BulkLinks
from moesaic.cluster.expert_keys import ExpertVersion
from moesaic.cluster.placement import ModelRef, Placement, PlacementId
from moesaic.cluster.routing.policy import RouterPolicy
from moesaic.cluster.routing.transports import TransportChoice
from moesaic.cluster.training.orders import Answer, Order
from moesaic.cluster.training.run_plan import PoolNow
from moesaic.cluster.training.runs import RunProgress
from moesaic.cluster.training.steps import TrainingSteps
from moesaic.kernels.training.update_rules import UpdateRule
from moesaic.models.training.groups import TrainedTensors
from moesaic.models.training.trainable_trunk import TrainableTrunk
from moesaic.models.trunk.config import read_config
from moesaic.models.trunk.experts_layers import experts_layers
from moesaic.models.trunk.routing_record import record_routing
from moesaic.models.trunk.trunk import connect_experts, load_trunk, meta_model
from moesaic.proto.errors import MoesaicError
from moesaic.proto.keys import secret_of_process

TOKENS = (4096, 16384)
LENGTH = 512  # of a sequence
HOSTS = 2
VOCABULARY = 512
MAX_NORM = 1.0
SETTINGS: dict[str, Any] = {"lr": 1e-4}
# A call of 16,384 rows through the CPU's memory takes its time.
_POLICY = RouterPolicy(deadline_s=120.0, attempt_s=60.0)


@dataclass(frozen=True, slots=True)
class Sizes:
    experts: int = 128
    top_k: int = 8
    hidden: int = 2048
    intermediate: int = 768
    heads: int = 16


SMALL = Sizes(experts=8, top_k=2, hidden=64, intermediate=32, heads=4)


class ProcessPool:
    """A `TrainingPool` of hosts in processes of their own, which plays the controller's part."""

    def __init__(self, hosts: list[HostProcess], placement: Placement, router: Router) -> None:
        self._hosts = {host.entry.host: host for host in hosts}
        self._placement, self._router = placement, router
        self._threads = ThreadPoolExecutor(len(hosts))

    def now(self, skip: int | None = None, tells: RunProgress | None = None) -> PoolNow:
        return PoolNow(
            entries=self._placement.hosts,
            domains={host: host for host in self._hosts},
            holders={
                key.expert(expert): layer.hosts(expert)
                for key, layer in self._placement.layers.items()
                for expert in range(len(layer.replicas))
            },
            leaving=frozenset(),
        )

    def order(
        self, orders: Mapping[str, Order], timeout_s: float
    ) -> dict[str, Answer | MoesaicError]:
        hosts = [self._hosts[host] for host in orders]
        answers = self._threads.map(HostProcess.train, hosts, orders.values())
        return dict(zip(orders, answers, strict=True))

    def publish(self, version: int, timeout_s: float) -> PlacementId:
        before = self._placement
        versions = replace(before.versions, models={**before.versions.models, "m": version})
        number = PlacementId(before.id.term, before.id.epoch + 1)
        self._placement = replace(before, id=number, versions=versions)
        self._router.place(self._placement)
        for key, held_by in self.now().holders.items():
            for host in held_by:
                self._hosts[host].release([ExpertVersion(key, before.versions.of(key))])
        return number

    def end(self) -> None:
        self._threads.shutdown()


@contextmanager
def pool(
    folder: Path, device: str, transport: TransportChoice
) -> Iterator[tuple[Any, torch.optim.Optimizer]]:
    """Yield a trunk over hosts on the device, and its optimizer."""
    dtype = torch.bfloat16
    layers = experts_layers(meta_model(read_config(folder)))
    ref = ModelRef(name="m", dtype="bfloat16", path=str(folder), learns=True)
    with ExitStack() as stack:
        hosts = stack.enter_context(host_processes(HOSTS, device=device))
        placement = place(hosts, ref, {layer.layer: layer.num_experts for layer in layers})
        where = torch.device(device)
        router = Router(name="trains", node=NODE, device=where, transport=transport, policy=_POLICY)
        stack.callback(router.close)
        router.place(placement)
        router.wait_ready(60.0)
        model: Any = load_trunk(folder, dtype=dtype, device=where).train()
        model.requires_grad_(True)
        learning = Learning(router, "m", dtype)
        connect_experts(model, layers, learning.layer)
        learning.watch(model)
        record_routing(model)
        stack.callback(TrainableTrunk(model, layers, dtype).close)
        trunk = LearningTrunk(model=model, learning=learning, name="trains")
        controls = ProcessPool(hosts, placement, router)

        def open_run(trained: TrainedTensors, rule: UpdateRule) -> PoolRun:
            plan = plan_run(1, "m", trunk, layers, trained, rule, redundancy=0, exact=False)
            steps = TrainingSteps(plan, controls.now(), versions=placement.versions, next_version=2)
            links = BulkLinks(NODE, secret_of_process())
            return PoolRun(Coordinator(controls, steps), links, trunk)

        optimizer = RunOptimizer(model, open_run, **SETTINGS)
        stack.callback(optimizer.close)
        yield model, optimizer


def step_of(
    model: Any, optimizer: torch.optim.Optimizer, device: str
) -> Callable[[Tensor], dict[str, float]]:
    def step(ids: Tensor) -> dict[str, float]:
        began = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        forward = _now(device)
        loss.backward()
        backward = _now(device)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        updated = _now(device)
        return {
            "forward": forward - began,
            "backward": backward - forward,
            "update": updated - backward,
            "step": updated - began,
        }

    return step


def measure(
    device: str, *, tokens: tuple[int, ...] = TOKENS, rounds: int = 5, sizes: Sizes | None = None
) -> list[dict[str, Any]]:
    sizes = sizes or (SMALL if device == "cpu" else Sizes())
    length = min(LENGTH, *tokens)
    found = []
    torch.manual_seed(0)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_random_model(
            folder,
            layers=1,
            experts=sizes.experts,
            top_k=sizes.top_k,
            hidden=sizes.hidden,
            intermediate=sizes.intermediate,
            vocabulary=VOCABULARY,
            heads=sizes.heads,
        )
        whole: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, experts_implementation="grouped_mm"
        )
        whole = whole.to(device).train()
        steps = {
            "grouped_mm": step_of(
                whole, torch.optim.AdamW(whole.parameters(), fused=True, **SETTINGS), device
            )
        }
        transports: tuple[TransportChoice, ...] = ("shm",) if device == "cpu" else ("shm", "device")
        for transport in transports:
            ours = stack.enter_context(pool(folder, device, transport))
            steps[f"pool, {transport}"] = step_of(*ours, device)
        for count in tokens:
            ids = torch.randint(VOCABULARY, (count // length, length), device=device)
            for step in steps.values():  # the first run compiles
                step(ids)
            taken: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
            for _ in range(rounds):
                for name, step in steps.items():
                    taken[name].append(step(ids))
            ms = {
                name: {
                    part: round(1e3 * statistics.median(one[part] for one in all_), 2)
                    for part in all_[0]
                }
                for name, all_ in taken.items()
            }
            base = ms["grouped_mm"]["step"]
            ratios = {name: round(parts["step"] / base, 2) for name, parts in ms.items()}
            found.append({"tokens": count, "ms": ms, "ratios": ratios})
    show(found)
    return found


def show(found: list[dict[str, Any]]) -> None:
    table = Table(title="A training step on one card, ms")
    for column in ("tokens", "way", "forward", "backward", "update", "step", "of grouped_mm"):
        table.add_column(column, justify="right")
    for one in found:
        for name, ms in one["ms"].items():
            parts = (f"{ms[part]:.1f}" for part in ("forward", "backward", "update", "step"))
            table.add_row(str(one["tokens"]), name, *parts, f"{one['ratios'][name]:.2f}")
    Console().print(table)


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    found = measure(arguments.device, tokens=tuple(arguments.tokens), rounds=arguments.rounds)
    write_json(arguments.json, {"results": found})


if __name__ == "__main__":
    main()
