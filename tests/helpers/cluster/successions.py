"""Processes that decide for a run: their successors, and those that were taken for dead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moesaic.cluster.training.orders import Answer, Exchange, Order
from moesaic.cluster.training.steps import TrainingSteps
from moesaic.cluster.versions import WeightVersions
from moesaic.proto.errors import ClusterError, HostLost, MoesaicError, Superseded
from tests.helpers.cluster.steps_invariants import check_broken
from tests.helpers.cluster.training_host import Violation
from tests.helpers.cluster.training_hosts import Killed, answer_of

if TYPE_CHECKING:
    from tests.helpers.cluster.steps_world import TrainingWorld

Answered = dict[str, Answer | MoesaicError]


@dataclass
class Zombie:
    """An exchange that was cut off before some of its orders were sent."""

    exchange: Exchange[object]
    orders: Mapping[str, Order]
    answers: Answered

    def act(self, ask: Callable[[str, Order], Answer | MoesaicError]) -> bool:
        """Send the orders that are left; return whether it goes on, as no host has refused it."""
        for name in sorted(self.orders.keys() - self.answers.keys()):
            answer = self.answers[name] = ask(name, self.orders[name])
            if isinstance(answer, Superseded):
                return False
        try:
            self.orders, self.answers = self.exchange.send(self.answers), {}
        except (StopIteration, MoesaicError):
            return False
        return True


def may_die(world: TrainingWorld, left: Zombie) -> None:
    """Let the process be gone, or only seem to be; raise Killed then."""
    chance = world.faults.killed if world.faults else 0.0
    if chance and world.random.random() < chance:
        world.happened["killed"] += 1
        world.zombies.append(left)
        world.forget_exchange()
        raise Killed


def let_zombies_act(world: TrainingWorld) -> None:
    def reach(name: str, order: Order) -> Answer | MoesaicError:
        place = world.places.get(name)
        if place is None or place.frozen:
            return HostLost(f"{name} does not answer")
        return answer_of(place.host, order)

    for zombie in list(world.zombies):
        if world.random.random() < 0.2:
            world.happened["zombie"] += 1
            if not zombie.act(reach):
                world.zombies.remove(zombie)


def succeed(world: TrainingWorld) -> None:
    """Let another process take the place of the one that decided.

    Raises ClusterError if state is lost.
    """
    while True:
        try:
            _succeed(world)
            return
        except Killed:
            continue
        except ClusterError:
            check_broken(world)
            raise
        finally:
            world.succeeding = False


def _succeed(world: TrainingWorld) -> None:
    world.spread()
    plan = world.steps.plan
    model = plan.model
    world.steps = steps = TrainingSteps(
        replace(plan, run=plan.run + 1),
        world.now(),
        versions=WeightVersions({model: world.latest}),
        next_version=world.next_version,
    )
    world.succeeding = True
    world.exchange(steps.succeed(world.first_run))
    world.succeeding = False
    steps.check()
    published = world.made[world.latest]
    if steps.step not in (published, published + 1):
        raise Violation("no step is lost", f"{steps.step}, and {published} published")
    if steps.skipped is not None:
        world.next_version = steps.skipped + 1
        world.check()
    else:
        world.happened["finished"] += 1
        world.settle()
