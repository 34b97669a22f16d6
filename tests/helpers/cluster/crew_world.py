"""A training world whose steps are computed by several workers, which are killed and go on late."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moesaic.cluster.expert_keys import ExpertKey, LayerKey
from moesaic.cluster.training.contributions import Attempt, Part
from moesaic.cluster.training.workers import Worker, Workers
from moesaic.proto.errors import BadInput, MoesaicError, StepLost
from tests.helpers.cluster.steps_world import GROUPS, LAYERS, TrainingWorld
from tests.helpers.cluster.training_host import Violation
from tests.helpers.cluster.training_hosts import Interrupted, Killed

MICROBATCHES = 4
MOST_ACTIONS = 10_000  # of all workers in an attempt
NAMES = 7  # that workers have, one after the other


@dataclass
class Microbatch:
    """Its gradients, whoever computes it: of experts by layer, and of the trunk's blocks."""

    number: int
    experts: dict[int, dict[ExpertKey, int]] = field(default_factory=dict)
    trunk: dict[ExpertKey, int] = field(default_factory=dict)


class CrewWorld(TrainingWorld):
    """``crew`` workers at first; each action of one may be its last, for now or for ever."""

    def __init__(self, seed: int, *, crew: int = 3, **settings: Any) -> None:
        super().__init__(seed, **settings)
        self._hired = 0
        self._met: set[str] = set()  # meetings of the attempt that are over
        self.workers = Workers()
        self.alive: dict[str, Worker] = {}
        # Workers that were taken for dead, or have not heard that their attempt is over.
        self.late: list[Iterator[None]] = []
        for _ in range(crew):
            self.hire()

    def hire(self) -> None:
        """Let a worker come; it may have the name of one that is gone."""
        self._hired += 1
        name = f"w{self._hired % NAMES}"
        if name not in self.alive:
            self.alive[name] = Worker(name, self._hired)

    def attempt(self) -> None:
        steps, attempt = self.steps, self.steps.attempt
        for worker in self.alive.values():
            self.workers.wait(worker, 0.0)
        assert self.workers.may_begin
        self.workers.begin()
        self._met = set()
        of_step = random.Random(steps.step)
        without = frozenset({of_step.randrange(LAYERS)} if of_step.random() < 0.3 else ())
        batch = [self._microbatch(of_step, number, without) for number in range(MICROBATCHES)]
        self._foresee(batch, without)
        part = self.workers.part
        acting = {
            name: self._act(self.alive[name], attempt, batch[number :: len(part)])
            for number, name in enumerate(part)
        }
        before = steps.step
        try:
            for _ in range(MOST_ACTIONS):
                if "commit" in self._met:
                    break
                name = self.random.choice(sorted(acting))
                self._disturb(name, acting)
                next(acting[name], None)
            else:
                raise Violation("workers meet", f"{self._met} and no more")
        finally:
            self.late += [one for one in acting.values() if self.random.random() < 0.5]
        if steps.step != before:
            self.settle()

    def _microbatch(
        self, chance: random.Random, number: int, without: frozenset[int]
    ) -> Microbatch:
        experts = {
            layer: {key: chance.randrange(1, 1000) for key in self._used(chance, layer)}
            for layer in set(range(LAYERS)) - without
        }
        return Microbatch(number, experts, {key: chance.randrange(1, 1000) for key in self.blocks})

    def _foresee(self, batch: list[Microbatch], without: frozenset[int]) -> None:
        sums, trunk = Counter[ExpertKey](), Counter[ExpertKey]()
        for one in batch:
            trunk.update(one.trunk)
            for layer, given in one.experts.items():
                sums.update(given)
                if layer == self.shared.layer:
                    sums[self.shared] += sum(given.values())
        self._expect(trunk, sums, without)

    # ---- a worker -------------------------------------------------------------------------------

    def _act(self, worker: Worker, attempt: Attempt, own: list[Microbatch]) -> Iterator[None]:
        """Do what a worker does in one step, an action at a time. Raises StepLost."""
        for one in own:
            for layer, given in one.experts.items():
                self._send(attempt, LayerKey(self.keys[0].model, layer), one.number, given)
                if attempt == self.steps.attempt:
                    self._meanwhile()
                yield
        learned = frozenset(layer for one in own for layer in one.experts)
        yield from self._meet(worker, attempt, "experts", learned, self._reduce_experts)
        trunk = Counter[ExpertKey]()
        for one in own:
            trunk.update(one.trunk)
        for key, gradient in sorted(trunk.items()):
            for entry in self.steps.owning(key):
                for _ in range(self.random.choice([1, 1, 2])):
                    try:
                        self.hosts.reach(entry).put(attempt, key, worker.name, gradient)
                    except MoesaicError as error:
                        raise StepLost(str(error)) from error
            yield
        yield from self._meet(worker, attempt, "trunk", frozenset(trunk), self._reduce_trunk)
        yield from self._meet(worker, attempt, "commit", None, self._commit)

    def _send(
        self, attempt: Attempt, layer: LayerKey, microbatch: int, given: Mapping[ExpertKey, int]
    ) -> None:
        version = self.steps.versions.of(self.keys[0])
        for number, (key, gradient) in enumerate(given.items()):
            holders = self.holders(key)
            if not holders:
                raise StepLost(f"{key} is nowhere")
            name, part = self.random.choice(holders), Part(layer, 0, microbatch, number)
            found = {key: gradient}
            if layer.layer == self.shared.layer:
                found[self.shared] = gradient
            lost = ""
            for _ in range(3):
                try:
                    self.hosts.add(name, attempt, part, version, found)
                except MoesaicError as error:
                    lost = str(error)
                else:
                    # Its answer may be lost.
                    if self.faults is None or self.random.random() >= self.faults.unanswered:
                        break
                    lost = "no answer"
            else:
                raise StepLost(f"{key}: {lost}")

    def _meet(
        self,
        worker: Worker,
        attempt: Attempt,
        where: str,
        brings: Any,
        act: Callable[[Mapping[str, Any]], None],
    ) -> Iterator[None]:
        if attempt != self.steps.attempt or not self.workers.takes_part(worker):
            raise StepLost(f"{attempt} is over")
        for _ in range(self.random.choice([1, 1, 2])):
            try:
                brought = self.workers.meet(worker, where, brings)
            except BadInput as error:
                raise Violation("workers meet", str(error)) from error
            if brought is not None and where not in self._met:
                act(brought)
                self._met.add(where)
        met = self._met
        while where not in met:
            yield
            if attempt != self.steps.attempt and where not in met:
                raise StepLost(f"{attempt} is over")

    def _reduce_experts(self, brought: Mapping[str, frozenset[int]]) -> None:
        learned = frozenset[int]().union(*brought.values())
        self.exchange(self.steps.reduce_experts(frozenset(range(LAYERS)) - learned))
        if self.faults is not None:
            self.change_pool()

    def _reduce_trunk(self, brought: Mapping[str, frozenset[ExpertKey]]) -> None:
        put: dict[ExpertKey, list[str]] = {}
        for name, blocks in brought.items():
            for key in blocks:
                put.setdefault(key, []).append(name)
        self.exchange(self.steps.reduce_trunk(put))

    def _commit(self, _: Mapping[str, None]) -> None:
        before = self.steps.step
        try:
            self.exchange(self.steps.commit(GROUPS))
        except Interrupted:
            if self.steps.step == before:
                raise

    # ---- what happens to workers ----------------------------------------------------------------

    def _disturb(self, name: str, acting: dict[str, Iterator[None]]) -> None:
        """Let those that are late go on, and a worker be gone. Raises StepLost then."""
        if self.late and self.random.random() < 0.3:
            at = self.random.randrange(len(self.late))
            self.happened["late"] += 1
            try:
                if next(self.late[at], "over") == "over":
                    del self.late[at]
            except (MoesaicError, Interrupted, Killed):
                del self.late[at]
        if self.faults is None or self.random.random() >= self.faults.worker_gone:
            return
        self.happened["worker gone"] += 1
        self.workers.leave(self.alive.pop(name))
        self.late.append(acting.pop(name))
        if not self.alive or self.random.random() < 0.7:
            self.hire()
        raise self.steps.lose(self.workers.missing)
