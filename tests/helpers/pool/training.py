"""A trunk that learns over hosts in this process, and what a plain model computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moesaic.actors.training.learning import Learning
from moesaic.actors.trunk.attach import expert_tensors
from moesaic.cluster.expert_keys import ExpertKey
from moesaic.cluster.routing.policy import RouterPolicy
from moesaic.cluster.training.contributions import Attempt
from moesaic.cluster.training.orders import Begin, BulkKey, Gather, Gathered, OpenRun
from moesaic.models.trunk.experts_layers import experts_layers
from moesaic.models.trunk.routing_record import record_routing
from moesaic.models.trunk.trunk import connect_experts, load_trunk
from tests.helpers.models.architectures import tiny_model
from tests.helpers.pool.serving import PATIENT, Hosts, serving

FIRST = Attempt(1, 0, 0)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
Gradients = dict[ExpertKey, dict[str, Tensor]]


def saved(folder: Path, architecture: str) -> Path:
    tiny_model(architecture).save_pretrained(folder)
    return folder


def plain_model(folder: Path, dtype: torch.dtype) -> Any:
    # The other implementations take no float64.
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager"
    ).train()


class Trunk:
    """A trunk that learns, over hosts in this process."""

    def __init__(self, pool: Hosts, folder: Path, dtype: torch.dtype, *, borrows: bool) -> None:
        self.pool, self.dtype = pool, dtype
        self.model: Any = load_trunk(folder, dtype=dtype, device=torch.device("cpu")).train()
        self.model.requires_grad_(True)
        self.connect(PATIENT, borrows=borrows)

    def connect(self, policy: RouterPolicy, *, borrows: bool = False) -> None:
        self.learning = Learning(self.pool.router(borrows=borrows, policy=policy), "m", self.dtype)
        connect_experts(self.model, self.pool.layers, self.learning.layer)
        self.learning.watch(self.model)
        record_routing(self.model)

    def open(self, run: int = FIRST.run, optimizer: str = "SGD", **settings: object) -> None:
        for host in self.pool.hosts:
            host.train(OpenRun(run=run, model="m", optimizer=optimizer, settings=settings))

    def begin(self, attempt: Attempt = FIRST, *, exact: bool = False) -> None:
        for host in self.pool.hosts:
            host.train(Begin(attempt=attempt, exact=exact))
        self.learning.begin(attempt)

    def gradients(self, attempt: Attempt = FIRST) -> Gradients:
        """Those of the experts, summed over hosts."""
        found: Gradients = {}
        for host in self.pool.hosts:
            answer = host.train(Gather(attempt=attempt))
            assert isinstance(answer, Gathered)
            for key in answer.keys:
                sums = found.setdefault(key, {})
                wanted = BulkKey("gradient", key, attempt=attempt, source=host.name)
                with host.training.reading(wanted) as tensors:
                    for name, tensor in tensors.items():
                        sums[name] = sums[name] + tensor if name in sums else tensor.clone()
        return found


@contextmanager
def training(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float64,
    borrows: bool = False,
    opened: bool = True,
    **options: Any,
) -> Iterator[Trunk]:
    """``opened``: the hosts are in run 1 already."""
    with serving(folder, dtype=dtype, learns=True, lends=borrows, **options) as pool:
        trunk = Trunk(pool, folder, dtype, borrows=borrows)
        if opened:
            trunk.open()
        yield trunk


def loss_of(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def expected(model: Any) -> tuple[dict[str, Tensor], Gradients]:
    """The gradients of a plain model: of all but its experts, and of these as the pool has them."""
    of_experts: Gradients = {}
    layers = experts_layers(model)
    names = {id(p) for layer in layers for p in layer.module._parameters.values() if p is not None}
    others = {n: p.grad for n, p in model.named_parameters() if id(p) not in names}
    for layer in layers:
        for parameter in layer.module._parameters.values():
            if parameter is not None and parameter.grad is not None:
                parameter.data = parameter.grad
        for expert in range(layer.num_experts):
            of_experts[ExpertKey("m", layer.layer, expert)] = expert_tensors(layer, expert)
    return {name: grad for name, grad in others.items() if grad is not None}, of_experts


def assert_near(given: Tensor, wanted: Tensor, tolerance: float, name: str) -> None:
    scale = float(wanted.abs().max()) or 1.0
    error = float((given - wanted).abs().max()) / scale
    assert error <= tolerance, f"{name}: {error}"
