"""A trunk that learns over hosts in the test's own process, and the same model without a pool."""

from __future__ import annotations

from collections.abc import Collection, Iterator
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
from moesaic.models.trunk.experts_layers import experts_layers
from moesaic.models.trunk.routing_record import record_routing
from moesaic.models.trunk.trunk import connect_experts, load_trunk
from tests.helpers.models.architectures import tiny_model
from tests.helpers.pool.lending import heard
from tests.helpers.pool.serving import PATIENT, Hosts, serving

FIRST = Attempt(1, 0, 0)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
# Of each kind of form: gated, shared experts, bias and clamps and interleaved, not gated.
ARCHITECTURES = ("mixtral", "qwen2_moe", "gpt_oss", "nemotron_h", "deepseek_v3")
# Their own code computes gates in float32, whatever the model's type.
FLOAT32_GATES = ("nemotron_h",)

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

    def connect(
        self,
        policy: RouterPolicy,
        *,
        borrows: bool = False,
        lenders: Collection[str] | None = None,
        sums_limit_bytes: int | None = None,
    ) -> None:
        """``lenders``: the hosts that lend; None: all."""
        router = self.pool.router(borrows=borrows, policy=policy)
        if borrows:
            heard(router, *(self.pool.placement.hosts if lenders is None else lenders))
        self.learning = Learning(router, "m", self.dtype, sums_limit_bytes=sums_limit_bytes)
        connect_experts(self.model, self.pool.layers, self.learning.layer)
        self.learning.watch(self.model)
        record_routing(self.model)

    def begin(self, attempt: Attempt = FIRST, *, exact: bool = False) -> None:
        for host in self.pool.hosts:
            host.begin_attempt(attempt, exact=exact)
        self.learning.begin(attempt)

    def gradients(self, attempt: Attempt = FIRST, *, here: bool | None = None) -> Gradients:
        """Those of the experts, summed over hosts and this process.

        ``here`` says that this process has all of them, or none.
        """
        by_hosts = [host.take_gradients(attempt) for host in self.pool.hosts]
        mine = self.learning.take()
        assert here is None or not any(by_hosts if here else [mine])
        found: Gradients = {}
        for taken in (*by_hosts, mine):
            for key, tensors in taken.items():
                sums = found.setdefault(key, {})
                for name, tensor in tensors.items():
                    sums[name] = sums[name] + tensor if name in sums else tensor
        return found


@contextmanager
def training(
    folder: Path, *, dtype: torch.dtype = torch.float64, borrows: bool = False, **options: Any
) -> Iterator[Trunk]:
    with serving(folder, dtype=dtype, learns=True, lends=borrows, **options) as pool:
        yield Trunk(pool, folder, dtype, borrows=borrows)


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


def assert_equal(trunk: Trunk, found: Gradients, plain: Any, tolerance: float) -> None:
    others, of_experts = expected(plain)
    mine = {n: p.grad for n, p in trunk.model.named_parameters() if p.grad is not None}
    assert mine.keys() == others.keys()
    for name, wanted in others.items():
        assert_near(mine[name], wanted, tolerance, name)
    for key, tensors in of_experts.items():
        for name, wanted in tensors.items():
            given = found.get(key, {}).get(name, torch.zeros_like(wanted))
            assert_near(given, wanted, tolerance, f"{key} {name}")


def assert_near(given: Tensor, wanted: Tensor, tolerance: float, name: str) -> None:
    scale = float(wanted.abs().max()) or 1.0
    error = float((given - wanted).abs().max()) / scale
    assert error <= tolerance, f"{name}: {error}"


def enable_checkpointing(model: Any, *, reentrant: bool) -> None:
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()  # or nothing before the first layer would learn
