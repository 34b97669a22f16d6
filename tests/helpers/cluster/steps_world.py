"""A pool and a user around the state machine of training steps: faults from a seed, and checks.

The world plays the shell of a run (`actors/training/run.py`), the controller and the trunk. A host
that is frozen carries out later, in their order, what reaches it meanwhile. A part of a backward
call has an integer per expert as its gradient.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

from moesaic.cluster.expert_keys import (
    FIRST_VERSION,
    SHARED,
    TRUNK,
    ExpertKey,
    LayerKey,
    is_shared,
    trunk_block,
)
from moesaic.cluster.training.contributions import Part
from moesaic.cluster.training.host_memory import TrainedBytes
from moesaic.cluster.training.orders import (
    Answer,
    Begin,
    CloseRun,
    Commit,
    Disown,
    Exchange,
    Finish,
    GroupUpdate,
    OpenRun,
    Order,
    Own,
    Succeed,
)
from moesaic.cluster.training.run_plan import PoolNow, RunPlan, Trained
from moesaic.cluster.training.steps import TrainingSteps
from moesaic.cluster.versions import WeightVersions
from moesaic.proto.errors import (
    ClusterError,
    HostGone,
    MoesaicError,
    NoAnswer,
    StepLost,
    Superseded,
)
from tests.helpers.cluster.steps_invariants import check_broken, check_owners, check_settled
from tests.helpers.cluster.successions import Zombie, let_zombies_act, may_die, succeed
from tests.helpers.cluster.training_host import Owned, Violation, first_weights
from tests.helpers.cluster.training_hosts import (
    Faults,
    Interrupted,
    Killed,
    TrainingHosts,
    answer_of,
)

MODEL, RUN, WORKER = "m", 7, "trunk"
LAYERS, EXPERTS, BLOCKS, MICROBATCHES = 2, 4, 2, 2
MOVES = CloseRun | OpenRun | Own | Disown  # they let owners follow hosts
TWICE = Commit | Succeed | Finish  # a host that answers neither time counts as lost
# What becomes of an order to a host; None: what happens is left to chance.
Gate = Callable[[str, Order], Literal["order lost", "answer lost"] | None]
ACTIONS = "join", "drain", "stay", "lose", "restart", "freeze", "overlook", "thaw"
GROUPS = {0: GroupUpdate(1.0, {"lr": 0.1})}
T = TypeVar("T")


class TrainingWorld:
    """A run, the hosts under it, and the one who trains."""

    def __init__(
        self, seed: int, *, hosts: int = 4, redundancy: int = 1, faults: Faults | None = None
    ) -> None:
        self.random = random.Random(seed)
        self.faults: Faults | None = None
        self.gate: Gate = lambda name, order: None
        self.hosts = TrainingHosts(self.random)
        self.happened, self.excused = self.hosts.happened, self.hosts.excused
        self.places = self.hosts.places
        # Of the exchange under way: hosts that may have failed, and that have not answered once.
        self._doubtful: set[str] = set()
        self._asked_once: set[str] = set()
        self._following = False  # the exchange under way is `follow`
        self._seen: PoolNow | None = None  # as the controller saw the hosts last
        self.succeeding = False  # likewise, `succeed`
        self.zombies: list[Zombie] = []
        self.first_run = RUN
        self.leaving: set[str] = set()
        self.lost: list[str] = []  # why attempts were lost
        self.latest = FIRST_VERSION  # that is published
        self.next_version = FIRST_VERSION + 1  # as the controller knows it
        self.made = {FIRST_VERSION: 0}  # version -> the steps that have led to it
        self.keys = [
            ExpertKey(MODEL, layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)
        ]
        self.blocks = [trunk_block(MODEL, block) for block in range(BLOCKS)]
        # The experts of the first layer share something.
        self.shared = ExpertKey(MODEL, 0, SHARED)
        trained = (*self.keys, self.shared, *self.blocks)
        # What an undisturbed run has: after no step, after one, and so on.
        self.reference = [{key: Owned(first_weights(key)) for key in trained}]
        for _ in range(hosts):
            self.hosts.join()
        for number, key in enumerate(self.keys):
            for at in range(self.random.choice([1, 1, 2])):
                self.serve(list(self.places)[(number + at) % hosts], key)
        plan = RunPlan(
            run=RUN,
            model=MODEL,
            optimizer="SGD",
            settings={},
            tensors={
                key: Trained(
                    groups={"w": 0},
                    memory=TrainedBytes(master=1 if is_shared(key) else self.random.randint(1, 9)),
                )
                for key in trained
            },
            redundancy=redundancy,
        )
        self.steps = TrainingSteps(
            plan, self.now(), versions=WeightVersions(), next_version=self.next_version
        )
        self.exchange(self.steps.open())
        for key in self.blocks:
            for entry in self.steps.owning(key):
                self.hosts.reach(entry).put_weights(RUN, key, first_weights(key))
        self.exchange(self.steps.own())
        self.check()
        self.faults = faults

    # ---- the pool -------------------------------------------------------------------------------

    def now(self) -> PoolNow:
        seen, self._seen = self._seen, self._as_it_is()
        unseen = self.faults.unseen if self.faults and seen else 0.0
        if unseen and self.random.random() < unseen:
            assert seen is not None
            self.happened["unseen"] += seen.entries != self._seen.entries
            self._seen = seen
        return self._seen

    def _as_it_is(self) -> PoolNow:
        heard = {name: place for name, place in self.places.items() if not place.unheard}
        return PoolNow(
            entries={name: place.host.entry for name, place in heard.items()},
            domains={name: place.domain for name, place in heard.items()},
            holders={key: tuple(self.holders(key)) for key in self.keys},
            leaving=frozenset(self.leaving & heard.keys()),
        )

    def holders(self, key: ExpertKey) -> list[str]:
        """Return the hosts that the trunk's router sends an expert's rows to."""
        found = [name for name, place in self.places.items() if key in place.host.experts]
        return [name for name in found if (key, self.latest) in self.places[name].host.weights]

    def serve(self, name: str, key: ExpertKey) -> None:
        """The controller lets a host load the version of an expert that is published."""
        host = self.places[name].host
        host.experts.add(key)
        host.weights[key, self.latest] = self.reference[self.made[self.latest]][key].master

    def spread(self) -> None:
        """The controller lets experts that no host serves be served again."""
        for key in self.keys:
            if not self.holders(key):
                self.serve(self.random.choice(list(self.places)), key)

    def _may_lose(self, name: str) -> bool:
        faults, place = self.faults, self.places.get(name)
        if faults is None or place is None or len(self.places) < 3:
            return False
        if self.succeeding and (faults.one_at_a_time or faults.idle_only):
            return False  # the new run does not know the owners yet
        if faults.idle_only and place.host.owned:
            return False
        if not faults.one_at_a_time:
            return True
        others = [n for n in self.places if n != name and n not in self.leaving]
        return len(others) >= 2 and all(
            any(
                entry.host != name and self.hosts.is_safe(key, entry, self._doubtful)
                for entry in self.steps.owning(key)
            )
            for key in self.steps.owners
        )

    def change_pool(self) -> None:
        """Let something happen to the pool while the user does something else."""
        assert self.faults is not None
        if self.random.random() >= self.faults.pool_changes:
            return
        some = self.random.choice(list(self.places))
        match self.random.choice(ACTIONS):
            case "join" if len(self.places) < 7:
                self.happened["joined"] += 1
                name = self.hosts.join()
                for key in self.random.sample(self.keys, 2):
                    self.serve(name, key)
            case "drain" if len(self.places) - len(self.leaving) > 3:
                self.happened["drained"] += 1
                self.leaving.add(some)
            case "stay":
                self.leaving -= set(sorted(self.leaving)[:1])
            case "lose" if self.faults.lost and self._may_lose(some):
                self.hosts.lose(some)
            case "restart" if self.faults.restarted and self._may_lose(some):
                self.hosts.restart(some)
            case "freeze" if self.faults.frozen and self._may_lose(some):
                self.hosts.freeze(some)
            case "overlook" if self.faults.frozen and self._may_lose(some):
                self.hosts.overlook(some)
            case "thaw":
                self.hosts.thaw(some)
        self._let_go()

    def _let_go(self) -> None:
        """Hosts that are drained leave when they own nothing."""
        for name in sorted(self.leaving & self.places.keys()):
            place = self.places[name]
            if not (place.host.owned or place.frozen or place.unheard) and len(self.places) > 2:
                owns = any(name in hosts for hosts in self.steps.owners.values())
                if not owns and self.random.random() < 0.5:
                    self.happened["left"] += 1
                    del self.places[name]
                    self.leaving.discard(name)

    # ---- exchanges ------------------------------------------------------------------------------

    def exchange(self, exchange: Exchange[T]) -> T:
        answers: Mapping[str, Answer | MoesaicError] | None = None
        while True:
            try:
                orders = next(exchange) if answers is None else exchange.send(answers)
            except StopIteration as end:
                self.forget_exchange()
                return end.value
            except (AssertionError, KeyError) as error:
                raise Violation("errors are meant", repr(error)) from error
            names, answers = sorted(orders), {}
            self.random.shuffle(names)
            for name in names:
                may_die(self, Zombie(exchange, orders, answers))
                answers[name] = self._ask(name, orders[name])
                let_zombies_act(self)
                if isinstance(answers[name], Superseded):
                    raise Violation("the newest run is obeyed", f"{orders[name]}: {answers[name]}")
            if self.faults and self.random.random() < self.faults.interrupted:
                self.happened["interrupted"] += 1
                self.forget_exchange()
                raise Interrupted

    def forget_exchange(self) -> None:
        self._doubtful.clear()
        self._asked_once.clear()

    def _ask(self, name: str, order: Order) -> Answer | MoesaicError:
        faults, chance = self.faults, self.random.random
        if faults is not None:
            self._strike(name, faults)
        place = self.places.get(name)
        if place is None:
            return HostGone(f"{name} is gone")
        host = place.host
        if place.frozen:
            place.waiting.append(lambda: answer_of(host, order))
            return NoAnswer(f"{name} has not answered in time")
        moves = isinstance(order, MOVES) or (self._following and isinstance(order, Begin))
        if (fate := self.gate(name, order)) is not None:
            if fate == "answer lost":
                answer_of(host, order)
            return NoAnswer(f"{name} has not answered in time")
        if faults is not None and chance() < (
            faults.unanswered_moves if moves else faults.unanswered
        ):
            # A host that answers a commit neither time counts as lost.
            first = isinstance(order, TWICE) and name not in self._asked_once
            if first or not isinstance(order, TWICE) or self._may_lose(name):
                self.happened["unanswered"] += 1
                if isinstance(order, TWICE) and not first:
                    self.excused.add(name)
                    self._doubtful.add(name)
                self._asked_once |= {name} if first else set()
                if chance() < 0.5:
                    answer_of(host, order)
                return NoAnswer(f"{name} has not answered in time")
        if faults is not None and chance() < faults.repeated:
            self.happened["repeated"] += 1
            first = answer_of(host, order)
            again = answer_of(host, order)
            if type(first) is not type(again):
                raise Violation("orders can be repeated", f"{order}: {first!r}, then {again!r}")
        answer = answer_of(host, order)
        if faults is not None:
            self._strike(name, faults)
            if name not in self.places or self.places[name].host is not host:
                return HostGone(f"{name} is gone")
            if self.places[name].frozen:
                return NoAnswer(f"{name} has not answered in time")
        return answer

    def _strike(self, name: str, faults: Faults) -> None:
        at = self.random.random()
        for chance, strike in (
            (faults.lost, self.hosts.lose),
            (faults.restarted, self.hosts.restart),
            (faults.frozen, self.hosts.freeze),
        ):
            if at < chance:
                if self._may_lose(name):
                    strike(name)
                return
            at -= chance

    # ---- the user -------------------------------------------------------------------------------

    def train(self, steps: int, attempts: int) -> None:
        """Train until so many steps are committed, or so many attempts are over.

        Raises ClusterError if the run is broken.
        """
        for _ in range(attempts):
            if self.steps.step >= steps:
                return
            step = self.steps.step
            try:
                self.attempt()
            except Killed:
                succeed(self)
                continue
            except (StepLost, Interrupted) as error:
                self.lost.append(str(error))
                if self.steps.step != step:
                    raise Violation("an error means no step", f"step {step} was done") from None
            except ClusterError:
                if not self.steps.broken:
                    raise
                check_broken(self)
                raise
            if self.steps.step == step:
                self.hosts.wait()
                self.spread()
                try:
                    self.drop()
                except Killed:
                    succeed(self)

    def drop(self) -> None:
        """What zero_grad does."""
        while True:
            try:
                self.exchange(self.steps.again(self.now()))
                return
            except Interrupted:
                continue
            except ClusterError:
                check_broken(self)
                raise

    def attempt(self) -> None:
        steps, step, attempt = self.steps, self.steps.step, self.steps.attempt
        # Some layers and blocks have no gradients in some steps.
        of_step = random.Random(step)
        without = frozenset({of_step.randrange(LAYERS)} if of_step.random() < 0.3 else ())
        blocks = {key for key in self.blocks if of_step.random() < 0.8}
        sums: Counter[ExpertKey] = Counter()
        for microbatch in range(MICROBATCHES):
            for layer in set(range(LAYERS)) - without:
                given = {key: of_step.randrange(1, 1000) for key in self._used(of_step, layer)}
                sums.update(given)
                if layer == self.shared.layer:
                    sums[self.shared] += sum(given.values())
                self._backward(LayerKey(MODEL, layer), microbatch, given)
                self._meanwhile()
            if self.faults is not None and self.random.random() < 0.05:
                raise StepLost("the user has changed his mind")
        trunk = {key: of_step.randrange(1, 1000) for key in sorted(blocks)}
        self.exchange(steps.reduce_experts(without))
        if self.faults is not None:
            self.change_pool()
        try:
            for key, gradient in trunk.items():
                for entry in steps.owning(key):
                    self.hosts.reach(entry).put(attempt, key, WORKER, gradient)
        except MoesaicError as error:
            raise steps.lose(str(error)) from error
        self.exchange(steps.reduce_trunk(dict.fromkeys(blocks, (WORKER,))))
        self._expect(trunk, sums, without)
        before = steps.step
        try:
            self.exchange(steps.commit(GROUPS))
        except Interrupted:
            if steps.step == before:
                return  # the run is broken
        self.settle()

    def _used(self, of_step: random.Random, layer: int) -> list[ExpertKey]:
        return of_step.sample([key for key in self.keys if key.layer == layer], 2)

    def _backward(self, layer: LayerKey, microbatch: int, given: Mapping[ExpertKey, int]) -> None:
        for number, (key, gradient) in enumerate(given.items()):
            holders = self.holders(key)
            if not holders:
                raise StepLost(f"{key} is nowhere")
            # The same rows go to the same host again.
            name = self.random.choice(holders)
            errors: list[MoesaicError] = []
            while len(errors) < 3:
                try:
                    found = {key: gradient}
                    if layer.layer == self.shared.layer:
                        found[self.shared] = gradient
                    self._part(name, Part(layer, 0, microbatch, number), found)
                    break
                except MoesaicError as error:
                    errors.append(error)
            else:
                raise StepLost(f"{key}: {errors[-1]}") from errors[-1]

    def _part(self, name: str, part: Part, given: Mapping[ExpertKey, int]) -> None:
        attempt, version = self.steps.attempt, self.steps.versions.of(self.keys[0])
        if self.faults is not None:
            self._strike(name, self.faults)
        self.hosts.add(name, attempt, part, version, given)
        if self.faults is not None and self.random.random() < self.faults.unanswered:
            raise NoAnswer(f"{name}'s answer is lost")

    def _meanwhile(self) -> None:
        """What the keeper of the lease does beside the user."""
        if self.faults is None:
            return
        self.change_pool()
        if self.random.random() < 0.3:
            self.follow()

    def follow(self) -> None:
        self.spread()
        self._following = True
        try:
            self.exchange(self.steps.follow(self.now()))
        except Interrupted:
            pass
        except ClusterError:
            check_broken(self)
            raise
        finally:
            self._following = False
        if self.faults is None:
            self.check()

    def settle(self) -> None:
        """Publish what was committed, and begin the next attempt, as a run's shell does."""
        steps, masters = self.steps, self.reference[self.steps.step]
        before, self.latest = self.latest, steps.versions.of(self.keys[0])
        self.made[self.latest], self.next_version = steps.step, self.latest + 1
        self.check()
        for name, place in self.places.items():
            renewed = self.faults is None and name not in self.excused
            for key in place.host.experts:  # the controller lets hosts load what they lack
                if renewed and (key, self.latest) not in place.host.weights:
                    raise Violation("replicas are renewed", f"{key} at {name}")
                place.host.weights.setdefault((key, self.latest), masters[key].master)
            place.host.keep_versions({before, self.latest})
        self.spread()
        if self.faults is not None and self.random.random() < 0.2:
            self.change_pool()
            self.follow()
        while True:
            try:
                self.exchange(steps.begin())
                return
            except Interrupted:
                continue

    # ---- what has to hold -----------------------------------------------------------------------

    def _expect(
        self, trunk: Mapping[ExpertKey, int], sums: Mapping[ExpertKey, int], without: frozenset[int]
    ) -> None:
        """Take note of what the next step leads to."""
        after = {}
        for key, owned in self.reference[self.steps.step].items():
            left_out = key not in trunk if key.layer == TRUNK else key.layer in without
            gradient = None if left_out else trunk.get(key, sums.get(key, 0))
            after[key] = owned.updated(gradient)
        self.reference[self.steps.step + 1 :] = [after]

    def check(self) -> None:
        check_owners(self)

    def calm_down(self) -> None:
        """End the faults; the run gets its owners back, and goes on. Checks all of it."""
        self.faults = None
        for name in list(self.places):
            self.hosts.thaw(name)
        self.spread()
        self.drop()
        target = self.steps.step + 2
        self.train(target, attempts=3)
        if self.steps.step != target:
            raise Violation("a run goes on when faults end", self.steps.lost)
        self.follow()
        check_settled(self)
