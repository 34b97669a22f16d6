"""Training worlds from seeds, and bugs that are planted to see that a world shows them."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from moesaic.cluster.training.steps import TrainingSteps
from moesaic.proto.errors import ClusterError
from tests.helpers.cluster.steps_world import TrainingWorld
from tests.helpers.cluster.training_host import Violation

STEPS, ATTEMPTS = 6, 60


@dataclass
class Done:
    """What a seed has led to."""

    world: TrainingWorld
    broken: str = ""


def run_seed(
    seed: int, settings: Mapping[str, Any], kind: type[TrainingWorld] = TrainingWorld
) -> Done:
    """Train under faults and without them afterwards. Raises Violation."""
    world = kind(seed, **settings)
    try:
        world.train(STEPS, ATTEMPTS)
        world.calm_down()
    except ClusterError:
        assert world.steps.broken
        return Done(world, world.steps.broken)
    return Done(world)


@dataclass(frozen=True)
class Bug:
    """A bug in a method: ``new`` instead of ``old`` in its source."""

    method: str
    old: str
    new: str
    where: str  # the world or the scenario that shows it
    found: str  # the invariant
    owner: type = TrainingSteps  # the class

    def plant(self, patch: pytest.MonkeyPatch) -> None:
        source = textwrap.dedent(inspect.getsource(getattr(self.owner, self.method)))
        assert source.count(self.old) == 1, self
        module = sys.modules[self.owner.__module__]
        found: dict[str, Any] = {}
        code = compile(source.replace(self.old, self.new), f"<{self.method}>", "exec")
        exec(code, vars(module), found)
        patch.setattr(self.owner, self.method, found[self.method])


def find(
    bug: Bug,
    worlds: Mapping[str, Mapping[str, Any]],
    scenarios: Mapping[str, Callable[[], TrainingWorld]],
    seeds: int,
    patch: pytest.MonkeyPatch,
    kind: type[TrainingWorld] = TrainingWorld,
) -> None:
    """Plant a bug, and fail unless its world or scenario shows it."""
    bug.plant(patch)
    for seed in range(seeds if bug.where in worlds else 1):
        try:
            if bug.where in worlds:
                run_seed(seed, worlds[bug.where], kind)
            else:
                scenarios[bug.where]()
        except Violation as violation:
            assert violation.invariant == bug.found, violation
            return
    raise AssertionError("nothing shows it")
