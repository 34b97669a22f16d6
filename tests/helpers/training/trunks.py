"""Trunks that learn over hosts in this process, and the same model with its experts in itself.

Gradients of experts have the pool's names and shapes, whatever transformers has. They are compared
with those of a plain model, which transformers builds and differentiates alone.

Shape suffixes: V = vocabulary, K = assignments of a token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from moesaic.actors.training.learning import Learning
from moesaic.cluster.expert_keys import SHARED, ExpertKey
from moesaic.cluster.routing.policy import RouterPolicy
from moesaic.cluster.training.contributions import Attempt
from moesaic.cluster.training.orders import Begin, BulkKey, Gather, Gathered, OpenRun
from moesaic.kernels.ffn import SHARED_NAMES
from moesaic.models.trunk.adapters import needs_adapter
from moesaic.models.trunk.checkpoint import Checkpoint
from moesaic.models.trunk.config import read_config
from moesaic.models.trunk.experts_layers import experts_layers, is_experts_module
from moesaic.models.trunk.routing_record import record_routing
from moesaic.models.trunk.trunk import connect_experts, load_trunk
from tests.helpers.models.architectures import tiny_model
from tests.helpers.pool.lending import heard
from tests.helpers.pool.serving import PATIENT, Hosts, serving

FIRST = Attempt(1, 0, 0)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
# Their own code computes gates or attention in float32, whatever the model's type. What differs in
# the last bit of a float64 may round to the next float32.
FLOAT32_GATES = (
    *("beam", "ernie4_5_moe", "hunyuan_v1_moe", "longcat_flash", "nemotron_h"),
    "switch_transformers",
)
# Its own code multiplies what it has made float32 by a weight of the model's type.
NO_FLOAT64 = ("inkling2_text",)
# A parameter's gradient is small against what it is summed from, so the plain model's own rounding
# is as large.
LOOSE_FLOAT32 = ("bailing_hybrid", "hy_v4", "phimoe")
# What is drawn at random in a forward pass would not be the same in two models.
NOT_RANDOM: dict[str, dict[str, Any]] = {
    "switch_transformers": {"dropout_rate": 0.0, "router_jitter_noise": 0.0},
}

Gradients = dict[ExpertKey, dict[str, Tensor]]


def tolerance_of(architecture: str, dtype: torch.dtype = torch.float64) -> float:
    """How far gradients may be from the plain model's, relative to a tensor's largest value."""
    if dtype == torch.float64:
        return 1e-6 if architecture in FLOAT32_GATES else 1e-12
    return 1e-4 if architecture in LOOSE_FLOAT32 else 1e-5


def saved(folder: Path, architecture: str, **overrides: Any) -> Path:
    """Save a tiny model in which nothing is random."""
    model = tiny_model(architecture, **(NOT_RANDOM.get(architecture, {}) | overrides))
    for name, table_VK in model.named_buffers():
        if name.endswith("tid2eid"):  # a gate's table of experts, which is all zeros at first
            tokens, top_k = table_VK.shape
            table_VK.copy_(torch.stack([torch.randperm(8)[:top_k] for _ in range(tokens)]))
    model.save_pretrained(folder)
    return folder


def plain_model(folder: Path, dtype: torch.dtype) -> Any:
    config = read_config(folder)
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=dtype)
    if any(is_experts_module(module) for module in model.modules()):
        model.set_experts_implementation("eager")  # the others take no float64
    return model.train()


class Trunk:
    """A trunk that learns, over hosts in this process."""

    def __init__(self, pool: Hosts, folder: Path, dtype: torch.dtype, *, borrows: bool) -> None:
        self.pool, self.dtype = pool, dtype
        self.model: Any = load_trunk(folder, dtype=dtype, device=torch.device(pool.device)).train()
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

    def open(self, run: int = FIRST.run, optimizer: str = "SGD", **settings: object) -> None:
        for host in self.pool.hosts:
            host.train(OpenRun(run=run, model="m", optimizer=optimizer, settings=settings))

    def begin(self, attempt: Attempt = FIRST, *, exact: bool = False) -> None:
        for host in self.pool.hosts:
            host.train(Begin(attempt=attempt, exact=exact))
        self.learning.begin(attempt)

    def on_hosts(self, attempt: Attempt = FIRST) -> Gradients:
        """Those of the experts, summed over hosts."""
        found: Gradients = {}
        for host in self.pool.hosts:
            answer = host.train(Gather(attempt=attempt))
            assert isinstance(answer, Gathered)
            for key in answer.keys:
                wanted = BulkKey("gradient", key, attempt=attempt, source=host.name)
                with host.training.reading(wanted) as tensors:
                    _add(found, key, {name: tensor.cpu() for name, tensor in tensors.items()})
        return found

    def gradients(self, attempt: Attempt = FIRST, *, here: bool | None = None) -> Gradients:
        """Those of the experts, summed over hosts and this process.

        ``here`` says that this process has all of them, or none.
        """
        found = self.on_hosts(attempt)
        assert not (here and found)
        mine = self.learning.take()
        assert here is not False or not mine
        for key, tensors in mine.items():
            _add(found, key, tensors)
        return found


def gradients_of(trunks: Sequence[Trunk], attempt: Attempt = FIRST) -> Gradients:
    """Those of the experts, summed over hosts and the processes of all trunks."""
    found = trunks[0].on_hosts(attempt)
    for trunk in trunks:
        for key, tensors in trunk.learning.take().items():
            _add(found, key, tensors)
    return found


def _add(found: Gradients, key: ExpertKey, tensors: Mapping[str, Tensor]) -> None:
    sums = found.setdefault(key, {})
    for name, tensor in tensors.items():
        sums[name] = sums[name] + tensor if name in sums else tensor.clone()


@contextmanager
def learning_together(
    folder: Path,
    workers: int,
    *,
    dtype: torch.dtype = torch.float64,
    borrows: bool = False,
    opened: bool = True,
    **options: Any,
) -> Iterator[list[Trunk]]:
    """Trunks with routers of their own over one pool, whose hosts are in run 1 if ``opened``."""
    with serving(folder, dtype=dtype, learns=True, lends=borrows, **options) as pool:
        trunks = [Trunk(pool, folder, dtype, borrows=borrows) for _ in range(workers)]
        if opened:
            trunks[0].open()
        yield trunks


@contextmanager
def training(folder: Path, **options: Any) -> Iterator[Trunk]:
    with learning_together(folder, 1, **options) as (trunk,):
        yield trunk


def loss_of(model: Any, ids: Tensor = IDS, **given: Any) -> Tensor:
    torch.manual_seed(0)  # some gates draw experts at random
    ids = ids.to(next(model.parameters()).device)
    found = model(input_ids=ids, labels=ids, use_cache=False, **given)
    if found.loss is not None:
        return found.loss
    return cross_entropy(found.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def enable_checkpointing(model: Any, *, reentrant: bool) -> None:
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()  # or nothing before the first layer would learn


def trunk_gradients(*models: nn.Module) -> dict[str, Tensor]:
    """Those of all but the experts, summed over models."""
    sums: dict[str, Tensor] = {}
    for model in models:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] = sums[name] + parameter.grad if name in sums else parameter.grad
    return sums


def expected(model: Any, folder: Path) -> tuple[dict[str, Tensor], Gradients]:
    """The gradients of a plain model: of all but its experts, and of these as the pool has them.

    They are saved in place of the weights, and read as hosts read experts. ``folder`` is where the
    model came from.
    """
    checkpoint = Checkpoint(folder, read_config(folder), dtype=model.dtype)
    roots = _roots_of_experts(model, checkpoint)
    others = trunk_gradients(model)
    others = {n: g for n, g in others.items() if not n.startswith(roots)}
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    model.save_pretrained(folder / "gradients")
    checkpoint = Checkpoint(folder / "gradients", read_config(folder), dtype=model.dtype)
    of_experts: Gradients = {}
    for number, layer in checkpoint.layers.items():
        for expert in range(layer.num_experts):
            for name, tensor in checkpoint.read(number, expert).tensors().items():
                key = ExpertKey("m", number, SHARED if name in SHARED_NAMES else expert)
                of_experts.setdefault(key, {})[name] = tensor
    return others, of_experts


def _roots_of_experts(model: Any, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return what the names of experts' parameters in a plain model begin with."""
    own = {name for name, _ in checkpoint.model.named_parameters()}
    names = {name for name, _ in model.named_parameters()}
    if not needs_adapter(model):
        return tuple(f"{layer.name}." for layer in experts_layers(model))
    return tuple(names - own | {f"{layer.name}." for layer in checkpoint.layers.values()})


def assert_equal(
    trunks: Trunk | list[Trunk],
    found: Gradients,
    plain: Any,
    folder: Path,
    tolerance: float,
) -> None:
    """``found``: the gradients of the experts; those of the trunks are summed up here."""
    others, of_experts = expected(plain, folder)
    each = trunks if isinstance(trunks, list) else [trunks]
    mine = trunk_gradients(*(trunk.model for trunk in each))
    assert mine.keys() == others.keys()
    for name, wanted in others.items():
        assert_near(mine[name], wanted, tolerance, name)
    assert found.keys() <= of_experts.keys()
    for key, tensors in of_experts.items():
        for name, wanted in tensors.items():
            given = found.get(key, {}).get(name, torch.zeros_like(wanted))
            assert_near(given, wanted, tolerance, f"{key} {name}")


def assert_near(given: Tensor, wanted: Tensor, tolerance: float, name: str) -> None:
    scale = float(wanted.abs().max()) or 1.0
    error = float((given.cpu() - wanted.cpu()).abs().max()) / scale
    assert error <= tolerance, f"{name}: {error}"
