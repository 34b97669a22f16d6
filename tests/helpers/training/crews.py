"""Workers of one run that act one after the other or at once, as a test tells them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.actors.training.lead.coordinator import Coordinator
from moesaic.actors.training.optimizer import RunOptimizer
from moesaic.proto.errors import StepLost
from tests.helpers.training.runs import LocalPool, Team, optimizing, training_pool
from tests.helpers.training.trunks import IDS

WAIT_S = 60.0  # for what is to happen soon
MAX_NORM = 0.5
TOKENS = torch.cat([IDS.flatten(), IDS.flatten().flip(0), IDS.flatten() * 5])
LENGTHS = 3, 9, 4, 7, 5  # of the microbatches


def microbatches(step: int) -> list[Tensor]:
    return [(part[None] + step) % 32 for part in TOKENS[: sum(LENGTHS)].split(LENGTHS)]


def backward(model: Any, own: Sequence[Tensor]) -> tuple[float, int]:
    """Return the sum of the losses over tokens, and how many these are."""
    sums, count = 0.0, 0
    for ids in own:
        tokens = ids.numel() - 1
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss * tokens
        loss.backward()
        sums, count = sums + loss.item(), count + tokens
    return sums, count


def plain_losses(plain: Any, adam: torch.optim.Optimizer, steps: int) -> list[float]:
    """Return the losses of the same steps of a plain model, each over all microbatches."""
    found = []
    for step in range(steps):
        sums, count = backward(plain, microbatches(step))
        for parameter in plain.parameters():
            if parameter.grad is not None:
                parameter.grad /= count
        torch.nn.utils.clip_grad_norm_(plain.parameters(), MAX_NORM)
        adam.step()
        adam.zero_grad()
        found.append(sums / count)
    return found


def one_step(model: Any, optimizer: RunOptimizer) -> float:
    """Compute what is this worker's of the next step; return the loss of the whole step."""
    run: Any = optimizer.run
    while True:
        step = run.step
        own = microbatches(step)[run.number :: run.workers]
        try:
            sums, count = backward(model, own)
            total, tokens = run.total("loss", (sums, count))
            optimizer.step(weight=count)
            return total / tokens
        except StepLost:
            optimizer.zero_grad()


class Crew:
    """Workers that act one after the other or at once, as a test tells them."""

    def __init__(self, pool: LocalPool, folder: Path, least: int, stack: ExitStack) -> None:
        self.pool, self.folder, self.team, self._stack = pool, folder, Team(least), stack
        self.models: dict[str, Any] = {}
        self.optimizers: dict[str, RunOptimizer] = {}
        self._threads: dict[str, ThreadPoolExecutor] = {}

    def do(self, name: str, act: Callable[[Any, RunOptimizer], Any]) -> Future[Any]:
        return self._of(name).submit(lambda: act(self.models[name], self.optimizers[name]))

    def _of(self, name: str) -> ThreadPoolExecutor:
        if name not in self._threads:
            self._threads[name] = self._stack.enter_context(ThreadPoolExecutor(1, name))
        return self._threads[name]

    def join(self, name: str, **options: Any) -> Future[None]:
        def enter() -> None:
            given = optimizing(self.pool, self.folder, team=self.team, name=name, **options)
            self.models[name], self.optimizers[name] = self._stack.enter_context(given)

        return self._of(name).submit(enter)

    def begin(self, *names: str, **options: Any) -> None:
        for one in [self.join(name, **options) for name in names]:
            one.result(WAIT_S)

    def each(self, act: Callable[[Any, RunOptimizer], Any]) -> list[Any]:
        return [one.result(WAIT_S) for one in [self.do(name, act) for name in self.optimizers]]

    @property
    def lead(self) -> Coordinator:
        assert self.team.lead is not None
        return self.team.lead


@contextmanager
def crew(folder: Path, least: int = 2, **options: Any) -> Iterator[Crew]:
    given: dict[str, Any] = {"hosts": 2, "replicas": 2} | options
    with training_pool(folder, **given) as pool, ExitStack() as stack:
        yield Crew(pool, folder, least, stack)


def step(model: Any, optimizer: RunOptimizer, number: int | None = None) -> None:
    run: Any = optimizer.run
    own = microbatches(run.step if number is None else number)[run.number :: run.workers]
    _, count = backward(model, own)
    optimizer.step(weight=count)


def until(found: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    end = time.monotonic() + timeout_s
    while not found():
        assert time.monotonic() < end
        time.sleep(0.01)


def error_of(future: Future[Any]) -> BaseException | None:
    return future.exception(WAIT_S)
