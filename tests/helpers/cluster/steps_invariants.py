"""What holds after every step of a training run, whatever has failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesaic.cluster.expert_keys import SHARED, is_shared
from tests.helpers.cluster.training_host import Violation

if TYPE_CHECKING:
    from tests.helpers.cluster.steps_world import TrainingWorld


def check_owners(world: TrainingWorld) -> None:
    """Raise Violation unless the run's hosts are what they have to be after a step."""
    steps = world.steps
    masters = world.reference[steps.step]
    for key, owners in steps.owners.items():
        shared = key._replace(expert=SHARED)
        if shared in steps.owners and not set(owners) <= set(steps.owners[shared]):
            raise Violation("owners of experts own what these share", f"{key}: {owners}")
        if not owners:
            raise Violation("keys have owners", f"{key} has none")
        if len(set(owners)) < len(owners):
            raise Violation("owners are on different hosts", f"{key}: {owners}")
        for entry in steps.owning(key):
            place = world.places.get(entry.host)
            if place is None or place.host.entry != entry:
                continue  # the run will hear of it
            if place.host.owned.get(key) != masters[key]:
                raise Violation(
                    "owners are equal", f"{key} at {entry.host} after step {steps.step}"
                )
    for name, place in world.places.items():
        for (key, version), given in place.host.weights.items():
            made = world.made.get(version)
            if made is not None and given != world.reference[made][key].master:
                raise Violation("versions are whole", f"{key} version {version} at {name}")


def check_broken(world: TrainingWorld) -> None:
    """Raise Violation unless a broken run says why, and is right."""
    why, faults = world.steps.broken, world.faults
    assert why, "another error"
    if "checkpoint" not in why:
        raise Violation("an error says what to do", why)
    if "was interrupted" in why:
        return
    if faults is not None and (faults.one_at_a_time or faults.idle_only):
        raise Violation("one loss breaks nothing", why)
    if "no host that answers" in why and world.excused:
        return
    named = {host for host in world.hosts.names if f"{host}:" in why}
    if not named & world.excused:
        raise Violation("only a loss breaks a run", why)


def check_settled(world: TrainingWorld) -> None:
    owners, staying = world.steps.owners, world.places.keys() - world.leaving
    copies = min(1 + world.steps.plan.redundancy, max(len(staying), 1))
    domains = {world.places[name].domain for name in staying}
    for key, hosts in owners.items():
        if is_shared(key):
            of_experts = [own for one, own in owners.items() if one.layer == key.layer]
            if set(hosts) != {host for own in of_experts for host in own}:
                raise Violation("owners of experts own what these share", f"{key}: {hosts}")
        elif len(hosts) != copies:
            raise Violation("keys have all their owners", f"{key}: {hosts}, not {copies}")
        if staying and not staying.issuperset(hosts):
            raise Violation("hosts that are drained own nothing", f"{key}: {hosts}")
        if len({world.places[h].domain for h in hosts}) < min(len(domains), copies):
            raise Violation("owners are in different domains", f"{key}: {hosts}")
    for name, place in world.places.items():
        mine = {key for key, hosts in owners.items() if name in hosts}
        if place.host.owned.keys() != mine:
            raise Violation("hosts own what they should", f"{name}: {place.host.owned.keys()}")
    world.exchange(world.steps.close())
    if owning := [name for name, place in world.places.items() if place.host.owned]:
        raise Violation("hosts own what they should", f"{owning} after the run")
