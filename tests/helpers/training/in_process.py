"""A training run whose hosts are plain modules in this process, with gradients by autograd.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.actors.training.lead.coordination import TrunkSums
from moesaic.actors.training.optimizer import RunOptimizer
from moesaic.cluster.training.orders import GroupUpdate
from moesaic.kernels.training.update_rules import UpdateRule
from moesaic.models.training.groups import TrainedTensors
from moesaic.models.training.trainable_trunk import TrainableTrunk
from moesaic.models.trunk.experts_layers import ExpertsLayer, expert_parameters, experts_layers
from moesaic.models.trunk.in_pool import IMPLEMENTATION
from moesaic.models.trunk.trunk import connect_experts, strip_experts
from moesaic.proto.errors import StepLost

Key = tuple[int, str]  # (layer, name in the pool)
_RUNS = itertools.count(1)


@dataclass
class InProcessRun:
    """A `TrainingRun`; ``whole`` is the model with the experts, which are updated in it."""

    trunk: Any
    whole: Any
    checkpoints: dict[Path, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run = next(_RUNS)
        self.step = 0
        self.attempt = 0
        self.dropped = 0
        self.asked = 0  # how often squares were computed
        self.has_gradients = False
        self.closed = False
        self.number, self.workers = 0, 1
        self.given: dict[str, Tensor] = {}  # gradients of the trunk
        self.saving: Future[None] | None = None  # that a test finishes
        self.lose: str = ""  # the method that fails next
        self.poison: Key | None = None  # whose gradient gets an infinite value
        self.learned: Callable[[int], None] = lambda _: None
        self.layers = {layer.layer: layer for layer in experts_layers(self.whole)}
        self.tensors = {
            (number, name): parameter
            for number, layer in self.layers.items()
            for name, parameter in tensors_of(layer)
        }
        self.gradients: dict[Key, Tensor] = {}
        self._squares: dict[Key, float] | None = None
        self.optimizers: dict[str | Key, torch.optim.Optimizer] = {}

    def open(self, trained: TrainedTensors, rule: UpdateRule) -> InProcessRun:
        self.rule = rule
        self.group_of: dict[str | Key, int] = {
            (layer, name): group
            for layer, names in trained.experts.items()
            for name, group in names.items()
        }
        parameters = dict(self.trunk.named_parameters())
        masters: dict[str | Key, Tensor] = {
            key: self.tensors[key].data for key in self.group_of if isinstance(key, tuple)
        }
        for name, group in trained.trunk.items():
            masters[name] = parameters[name].detach().clone()
            self.group_of[name] = group
        self.masters = masters
        self.optimizers = {key: rule.optimizer_of(one) for key, one in masters.items()}
        return self

    # --- what hosts do

    def layer(self, number: int) -> InProcessLayer:
        return InProcessLayer(self, number)

    def add(self, key: Key, gradient: Tensor) -> None:
        self.gradients[key] = self.gradients[key] + gradient if key in self.gradients else gradient

    # --- the protocol

    def listen(self, learned: Callable[[int], None]) -> None:
        self.learned = learned

    def squares(self) -> Mapping[Key, float]:
        self._fail("squares")
        if self._squares is None:
            self.asked += 1
            if self.poison is not None:
                self.gradients[self.poison].view(-1)[0] = torch.inf
            self._squares = {
                key: float(self.gradients[key].double().square().sum())
                if key in self.gradients
                else 0.0
                for key in self.group_of
                if isinstance(key, tuple)
            }
        return self._squares

    def follow_weights(self, renewed: Callable[[], None]) -> None:
        pass

    def assignments(self) -> Mapping[int, Sequence[float]]:
        return {}

    @property
    def is_open(self) -> bool:
        return True

    @property
    def is_over(self) -> bool:
        return False

    @property
    def is_broken(self) -> bool:
        return False

    def not_finite(self) -> tuple[str, ...]:
        return tuple(
            f"{name} of expert {expert} of layer {layer}"
            for (layer, name), gradient in self.gradients.items()
            for expert, own in enumerate(gradient)
            if not own.isfinite().all()
        )

    def give_trunk(self, trunk: Mapping[str, Tensor], weight: float) -> TrunkSums:
        self._fail("give_trunk")
        self.given = dict(trunk)
        squares = {name: float(one.double().square().sum()) for name, one in trunk.items()}
        return TrunkSums(squares=squares, weight=weight)

    def commit(self, groups: Mapping[int, GroupUpdate] | None, skipped: frozenset[int]) -> None:
        self._fail("commit")
        assert self._squares is not None, "the squares are computed before the commit"
        assert groups is not None
        trunk = self.given
        parameters = dict(self.trunk.named_parameters())
        for key, group in self.group_of.items():
            if isinstance(key, tuple) and key[0] in skipped:
                continue
            if isinstance(key, str) and key not in trunk:
                continue
            master = self.masters[key]
            found = trunk[key] if isinstance(key, str) else self.gradients.get(key)
            gradient = torch.zeros_like(master) if found is None else found
            optimizer = self.optimizers[key]
            optimizer.param_groups[0].update(self.rule.values(groups[group].settings))
            master.grad = gradient * groups[group].coefficient
            optimizer.step()
            master.grad = None
            if isinstance(key, str):
                with torch.no_grad():
                    parameters[key].copy_(master)
        self.step += 1
        self._begin()

    def total(self, name: str, numbers: Sequence[float]) -> list[float]:
        return list(numbers)

    def drop(self) -> None:
        self.dropped += 1
        self._begin()

    def save(
        self, folder: Path, *, max_shard_size: int | str | None = None, wait: bool = True
    ) -> Future[None]:
        """Without ``wait`` the test does what `saving` has, and says so."""
        saving: Future[None] = Future()
        if wait:
            self._write(folder, max_shard_size)
            saving.set_result(None)
        else:
            self.saving = saving
        return saving

    def _write(self, folder: Path, max_shard_size: int | str | None) -> None:
        self.put_together().save_pretrained(folder, max_shard_size=max_shard_size or "50GB")
        self.checkpoints[folder.absolute()] = copy.deepcopy(
            {
                "step": self.step,
                "masters": self.masters,
                "states": {key: one.state_dict()["state"] for key, one in self.optimizers.items()},
            }
        )

    def put_together(self) -> Any:
        """Return the whole model, with the trunk's values."""
        trunk = self.trunk.state_dict()
        self.whole.load_state_dict(
            {name: trunk.get(name, one) for name, one in self.whole.state_dict().items()}
        )
        return self.whole

    def restore(self, folder: Path) -> None:
        found = copy.deepcopy(self.checkpoints[folder])
        parameters = dict(self.trunk.named_parameters())
        with torch.no_grad():
            for key, master in self.masters.items():
                master.copy_(found["masters"][key])
                if isinstance(key, str):
                    parameters[key].copy_(master)
        for key, one in self.optimizers.items():
            one.load_state_dict(one.state_dict() | {"state": found["states"][key]})
        self.step = found["step"]
        self._begin()

    def close(self) -> None:
        self.closed = True

    def _begin(self) -> None:
        self.attempt += 1
        self.gradients.clear()
        self._squares = None
        self.has_gradients = False

    def _fail(self, where: str) -> None:
        if self.lose == where:
            self.lose = ""
            raise StepLost(f"a host was lost in {where}")


@dataclass
class InProcessLayer:
    """A `LearningPool`."""

    run: InProcessRun
    number: int

    @property
    def dtype(self) -> torch.dtype:
        return self.run.whole.dtype

    def begin(self) -> int:
        return self.run.attempt

    def forward(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, call: object | None = None
    ) -> Tensor:
        with torch.no_grad():
            return self.run.layers[self.number].module(x_TH, ids_TK, weights_TK)

    def backward(
        self, call: object, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, grad_y_TH: Tensor
    ) -> tuple[Tensor, Tensor]:
        run = self.run
        run.has_gradients = True
        if call != run.attempt:
            raise StepLost("the forward pass belongs to an attempt that is over")
        assert run._squares is None, "gradients were added after the norm was asked for"
        run._fail("backward")
        layer = run.layers[self.number]
        named = dict(tensors_of(layer))
        inputs = [one.detach().requires_grad_() for one in (x_TH, weights_TK)]
        with torch.enable_grad():
            y_TH = layer.module(inputs[0], ids_TK, inputs[1])
        x, weights, *rest = torch.autograd.grad(
            y_TH, [*inputs, *named.values()], grad_y_TH, materialize_grads=True
        )
        for name, gradient in zip(named, rest, strict=True):
            run.add((self.number, name), gradient)
        run.learned(self.number)
        return x, weights


def tensors_of(layer: ExpertsLayer) -> Iterator[tuple[str, nn.Parameter]]:
    own = {name: layer.pool_name(name) for name, _ in expert_parameters(layer)}
    for name, parameter in layer.module.named_parameters():
        yield own.get(name, name), parameter


def open_run(plain: Any, checkpoints: dict[Path, dict[str, Any]] | None = None) -> InProcessRun:
    """Make a trunk of a copy of a model, and a run with another copy."""
    whole, trunk = copy.deepcopy(plain), copy.deepcopy(plain)
    layers = experts_layers(trunk)
    strip_experts(trunk)
    trunk.set_experts_implementation(IMPLEMENTATION)
    run = InProcessRun(trunk, whole, {} if checkpoints is None else checkpoints)
    connect_experts(trunk, layers, run.layer)
    TrainableTrunk(trunk, run.layers.values(), trunk.dtype)
    return run


@contextmanager
def training(
    run: InProcessRun, params: Callable[[Any], Any] | None = None, **options: Any
) -> Iterator[RunOptimizer]:
    """An optimizer over a trunk; ``params`` makes groups of a model."""
    given = None if params is None else params(run.trunk)
    optimizer = RunOptimizer(run.trunk, run.open, params=given, **options)
    try:
        yield optimizer
    finally:
        optimizer.close()
    assert run.closed


def differences(plain: Any, run: InProcessRun) -> dict[str, float]:
    """Return the largest difference of each parameter between a plain model and trunk + experts."""
    experts = {
        f"{layer.name}.{name}": parameter
        for layer in run.layers.values()
        for name, parameter in layer.module.named_parameters()
    }
    own = dict(run.trunk.named_parameters()) | experts
    wanted = dict(plain.named_parameters())
    assert own.keys() == wanted.keys()
    return {
        name: float((one.detach() - own[name].detach()).abs().max()) for name, one in wanted.items()
    }
