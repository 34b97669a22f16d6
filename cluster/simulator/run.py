"""Run the simulation of one seed, from the first event to the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .world import Violation, World

FAULTS_S = 12.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedRun:
    """The result of one simulation."""

    seed: int
    events: int
    calls: int  # layer calls that trunks made
    simulated_s: float
    faults: Mapping[str, int]  # by kind
    violation: Violation | None
    lines: tuple[str, ...]  # the last events
    digest: str  # of the log of all events


def run_seed(seed: int, *, faults_s: float = FAULTS_S) -> SeedRun:
    """Simulate a small pool under ``faults_s`` seconds of faults; a seed always does the same."""
    world = World(seed)
    violation = world.run(faults_s)
    return SeedRun(
        seed=seed,
        events=world.clock.happened,
        calls=world.calls,
        simulated_s=world.clock.now,
        faults=dict(sorted(world.network.tally.faults.items())),
        violation=violation,
        lines=tuple(world.lines),
        digest=world.digest,
    )
