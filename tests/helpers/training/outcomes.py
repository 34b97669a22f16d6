"""What some steps of a run have made, to the bit, however they were made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.actors.training.optimizer import RunOptimizer
from moesaic.cluster.expert_keys import TRUNK
from moesaic.cluster.training.orders import BulkKey
from moesaic.proto.errors import StepLost
from tests.helpers.pool.lending import heard
from tests.helpers.training.crews import backward
from tests.helpers.training.runs import LocalPool, Team, held, optimizing, training_pool

F32 = torch.float32
STEPS = 4
MAX_NORM = 0.5
# Tokens of a step's microbatches; the last one has more rows than hosts compute together.
SIZES = (1, 40), (1, 3), (2, 61), (1, 17), (3, 110)


@dataclass
class Outcome:
    losses: list[float]
    norms: list[float]
    tensors: dict[str, Tensor] = field(repr=False)  # weights and state

    def differences(self, other: Outcome) -> list[str]:
        """Names of what is not the same to the bit."""
        assert self.tensors.keys() == other.tensors.keys()
        found = [n for n, t in self.tensors.items() if not torch.equal(t, other.tensors[n])]
        found += ["losses"] * (self.losses != other.losses)
        return found + ["norms"] * (self.norms != other.norms)


def microbatches(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(3, 300, size, generator=generator) for size in SIZES]


def dealt(number: int, workers: int) -> Sequence[int]:
    return range(len(SIZES))[number::workers]


def whole_step(
    model: Any,
    optimizer: RunOptimizer,
    deal: Callable[[int, int], Sequence[int]] = dealt,
    then: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Make a step, again until it is done; return the loss and the norm of all of it.

    ``deal`` says which microbatches this worker has, of how many workers; ``then`` is called once,
    when its first backward passes are done.
    """
    run: Any = optimizer.run
    calls = [then]
    while True:
        every = microbatches(run.step)
        try:
            losses, count = [0.0] * len(every), 0
            for at in deal(run.number, run.workers):
                losses[at], tokens = backward(model, [every[at]])
                count += tokens
            while calls:
                calls.pop()()
            *losses, tokens = run.total("losses", (*losses, count))
            optimizer.step(weight=count)
            assert optimizer.grad_norm is not None
            return sum(losses) / tokens, optimizer.grad_norm
        except StepLost:
            optimizer.zero_grad()


def outcome_of(
    folder: Path,
    *,
    workers: int = 1,
    borrows: bool = False,
    exact: bool = True,
    dtype: torch.dtype = F32,
    deal: Callable[[int, int], Sequence[int]] = dealt,
    within: Callable[[LocalPool, int], None] = lambda pool, step: None,
    training: Mapping[str, Any] | None = None,
    **pool_options: Any,
) -> Outcome:
    """Train for some steps. ``within`` is called in each, when a worker has its gradients."""
    team = Team(workers)
    options: dict[str, Any] = {
        "dtype": dtype,
        "borrows": borrows,
        "team": team,
        "exact": exact,
        "max_grad_norm": MAX_NORM,
        **(training or {}),
    }
    with training_pool(folder, dtype=dtype, borrows=borrows, **pool_options) as pool:

        def work(number: int) -> Outcome | None:
            with optimizing(pool, folder, name=f"worker-{number}", **options) as (model, optimizer):
                if borrows:
                    heard(pool.routers[number], *pool.alive)
                found = []
                for step in range(STEPS):
                    then = partial(within, pool, step) if number == 0 else lambda: None
                    found.append(whole_step(model, optimizer, deal, then))
                return None if number else outcome(pool, team, model, found)

        with ThreadPoolExecutor(workers) as threads:
            first, *_ = threads.map(work, range(workers))
    assert first is not None
    return first


def outcome(
    pool: LocalPool, team: Team, model: Any, steps: Sequence[tuple[float, float]]
) -> Outcome:
    losses, norms = zip(*steps, strict=True)
    return Outcome(list(losses), list(norms), _tensors(pool, team, model))


def _tensors(pool: LocalPool, team: Team, model: Any) -> dict[str, Tensor]:
    """All weights and all state; the owners of a key have the same bits."""
    assert team.lead is not None
    found = {name: one.detach().clone() for name, one in model.named_parameters()}
    keys = [key for key in team.lead.plan.tensors if key.layer != TRUNK]
    for key, tensors in held(pool, keys).items():
        found |= {f"{key} {name}": tensor for name, tensor in tensors.items()}
    for key in team.lead.plan.tensors:
        for owner in team.lead.steps.owners[key]:
            wanted = BulkKey("state", key, run=1)
            with pool.alive[owner].training.reading(wanted) as state:
                for name, tensor in state.items():
                    before = found.setdefault(f"state {key} {name}", tensor.clone())
                    assert torch.equal(before, tensor)
    return found
