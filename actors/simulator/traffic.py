"""What users ask of a simulated pool: layers' calls, and new weights of experts.

The calls are small, with experts as skewed as those of a real gate. `Updates` stands for
`actors/controller/weight_updating.py`, and for whoever puts the new weights.

Shape suffixes: T = tokens, K = experts of a token, E = experts of a layer.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...cluster.expert_keys import ExpertKey, ExpertVersion, LayerKey
from ...cluster.placement import Placement
from ...cluster.routing.expert_options import SHORT_WAIT_S
from ...cluster.weight_updates import WeightUpdate, new_weights
from .experts import tensors_of
from .settings import Settings

if TYPE_CHECKING:
    from .controller import SimController
    from .world import World

_TOP_K = 2


class LayerRequest(NamedTuple):
    """One layer's call: expert ids (T, K), and how many seconds each token waits for an expert."""

    key: LayerKey
    ids_TK: np.ndarray
    patience_T: np.ndarray


class Traffic:
    """Random calls; `shift` makes other experts hot, and changes how often calls are made."""

    def __init__(self, settings: Settings, rng: np.random.Generator) -> None:
        self._settings = settings
        self._rng = rng
        self._weight_E: dict[LayerKey, np.ndarray] = {}
        self._pace = 1.0
        self.shift()

    def shift(self) -> None:
        self._pace = float(self._rng.choice([0.5, 1.0, 2.0, 4.0]))
        for shape in self._settings.models:
            for layer, experts in shape.experts.items():
                log_E = self._rng.normal(size=experts)
                weight_E = np.exp(log_E)
                self._weight_E[LayerKey(shape.model, layer)] = weight_E / weight_E.sum()

    def next(self, placement: Placement | None) -> LayerRequest | None:
        """Return a call of a layer in ``placement``; None if there is no layer."""
        keys = sorted(placement.layers) if placement is not None else []
        if not keys:
            return None
        key = keys[int(self._rng.integers(len(keys)))]
        weight_E = self._weight_E[key]
        tokens = int(self._rng.integers(1, 7))
        # Gumbel-top-k: the K largest of log weight + Gumbel noise are K different experts, drawn in
        # proportion to their weights.
        noise_TE = self._rng.gumbel(size=(tokens, weight_E.size)) + np.log(weight_E)
        ids_TK = np.argsort(-noise_TE, axis=1)[:, :_TOP_K].astype(np.int32)
        if self._rng.random() < 0.1:
            ids_TK[0, 0] = -1  # an assignment that is not used
        patience_T = np.full(tokens, self._settings.router.deadline_s)
        hasty_T = self._rng.random(tokens) < (0.5 if self._rng.random() < 0.2 else 0.0)
        patience_T[hasty_T] = SHORT_WAIT_S
        return LayerRequest(key, ids_TK, patience_T)

    def is_plain(self) -> bool:
        """Return whether the rows of a call have no options, so that it may be computed at once."""
        return bool(self._rng.random() < 0.3)

    def compute_s(self) -> float:
        """Return how long a trunk takes until it has computed what was lent of a call."""
        slowly = 50.0 if self._rng.random() < 0.05 else 1.0
        return float(self._rng.exponential(slowly * self._settings.lent_s))

    def step_ends(self) -> bool:
        """Return whether the forward pass ends with the call that has just ended."""
        return bool(self._rng.random() < 0.5)

    def pause_s(self) -> float:
        return float(self._rng.exponential(self._pace * self._settings.think_s))


# Mean seconds between two updates, the time that one may take, and between two looks at it.
_EVERY_S = 3.0
_PATIENCE_S = 6.0
_LOOK_S = 0.1


class Updates:
    """Begins updates, puts their weights, and has them served or reverted."""

    def __init__(self, world: World, rng: np.random.Generator) -> None:
        self._world = world
        self._rng = rng
        self._active = False
        self._contents = itertools.count(1)

    def start(self) -> None:
        self._active = self._world.settings.updates
        if self._active:
            self._later()

    def stop(self) -> None:
        self._active = False

    def _later(self) -> None:
        after_s = float(self._rng.exponential(_EVERY_S))
        self._world.clock.after(after_s, "somebody has new weights", self._next)

    def _next(self) -> None:
        if not self._active:
            return
        controller = self._world.registry.controller
        if controller is not None and controller.control is not None and not controller.frozen:
            self._begin(controller)
        self._later()

    def _begin(self, controller: SimController) -> None:
        world, rng = self._world, self._rng
        control = controller.control
        assert control is not None
        shape = world.settings.models[int(rng.integers(len(world.settings.models)))]
        until = world.clock.now + _PATIENCE_S
        try:
            if rng.random() < 0.3:
                update = control.updates.begin_revert(shape.model, who="test", until=until)
            else:
                keys = [
                    ExpertKey(shape.model, layer, expert)
                    for layer, experts in shape.experts.items()
                    for expert in range(experts)
                    if rng.random() < 0.3
                ]
                update = control.updates.begin(shape.model, keys, who="test", until=until)
        except ValueError as error:
            world.log(f"no update: {error}")
            return
        store(controller)
        world.log(f"update {update.number} of {shape.model} begins at {controller.name}")
        brought = dict(zip(new_weights(update), self._contents, strict=False))
        for one, content in brought.items():
            self._put(one, content)
        self._look(controller, update, brought)

    def _put(self, weights: ExpertVersion, content: int) -> None:
        """Put an expert into one host that holds an older version of it, if there is one."""
        able = [
            host
            for host in self._world.hosts.values()
            if host.alive and not host.frozen and len(host.versions(weights.key)) == 1
        ]
        if able:
            able[int(self._rng.integers(len(able)))].put(weights, tensors_of(weights, content))

    def _look(
        self,
        controller: SimController,
        update: WeightUpdate,
        brought: Mapping[ExpertVersion, int],
    ) -> None:
        control, world = controller.control, self._world
        if not controller.alive or control is None:
            return
        if control.updates.arriving().items() >= update.versions.items():
            if not controller.frozen and control.updates.is_ready(update):
                in_file = bool(self._rng.random() < 0.5)
                world.contents |= brought
                world.update_files |= brought if in_file else {}
                control.updates.serve(update, in_file=in_file)
                superseded = not store(controller)
                world.log(f"update {update.number} of {update.model} is served")
                if superseded:
                    controller.leave()
                return
            again = partial(self._look, controller, update, brought)
            world.clock.after(_LOOK_S, "an update waits", again)


def store(controller: SimController) -> bool:
    """Store a controller's updates for its successors; return whether no newer one rules."""
    assert controller.control is not None
    registry = controller.world.registry
    registry.updates[controller.term] = json.dumps(controller.control.snapshot())
    return registry.latest_term == controller.term


def take_over(controller: SimController) -> None:
    """Let a new controller go on with what the one before it has stored."""
    assert controller.control is not None
    registry = controller.world.registry
    earlier = [term for term in registry.updates if term < controller.term]
    if earlier:
        controller.control.restore(json.loads(registry.updates[max(earlier)]))
    store(controller)
