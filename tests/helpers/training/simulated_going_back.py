"""A run in a training world that goes back to a checkpoint when its state is lost."""

from __future__ import annotations

from moesaic.proto.errors import ClusterError, MoesaicError
from tests.helpers.cluster.steps_invariants import check_broken
from tests.helpers.cluster.steps_world import Interrupted, TrainingWorld
from tests.helpers.cluster.training_host import Violation

# A checkpoint is there after each such number of steps, and at the beginning.
EVERY_STEPS = 2
_TRIES = 50


def train_and_go_back(world: TrainingWorld, steps: int, attempts: int) -> None:
    """Train under faults and without them afterwards, as often as state is lost."""
    while True:
        try:
            world.train(steps, attempts)
            world.calm_down()
            return
        except ClusterError:
            check_broken(world)
            go_back(world)


def go_back(world: TrainingWorld) -> None:
    """Take one of the last checkpoints over, as the workers of a run do together."""
    last = world.steps.step // EVERY_STEPS * EVERY_STEPS
    world.happened["went back"] += 1
    for _ in range(_TRIES):
        saved = max(0, last - world.random.choice([0, EVERY_STEPS]))
        try:
            _take_over(world, saved)
            # What was made of later steps is never served again.
            world.made = {version: step for version, step in world.made.items() if step <= saved}
            world.settle()
        except (MoesaicError, Interrupted):
            world.happened["went back in part"] += 1
            world.hosts.wait()
            world.leaving -= set(sorted(world.leaving)[:1])  # somebody has to stay
            continue
        if world.steps.step != saved:
            raise Violation("a run goes on from its checkpoint", f"step {world.steps.step}")
        return
    raise Violation("a run goes back when it is tried again", world.steps.broken)


def _take_over(world: TrainingWorld, saved: int) -> None:
    steps = world.steps
    steps.skip()
    world.exchange(steps.forget(world.now()))
    for key, owned in world.reference[saved].items():
        for entry in steps.owning(key):
            world.hosts.reach(entry).put_state(steps.plan.run, key, owned)
    world.exchange(steps.take_over(saved))
