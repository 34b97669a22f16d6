"""A training run in the world around the controller's state machine."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from moesaic.cluster.expert_keys import ExpertKey, ExpertVersion
from moesaic.cluster.training.runs import LivingRun, Publication
from moesaic.cluster.versions import VERSIONS_AT_ONCE
from moesaic.proto.errors import ClusterError
from tests.helpers.cluster.control_world import ControlWorld, shape

DAY_S = 1e9  # the time of day when a world begins


class TrainingWorld(ControlWorld):
    """Hosts commit what a run tells them, beside what they serve."""

    def __init__(
        self, hosts: int = 2, *, replicas: int = 2, idle_s: float | None = None, **more: int
    ) -> None:
        # (version of an expert) -> the run that brought it: a number names one content.
        self.brought: dict[ExpertVersion, int] = {}
        model = replace(shape("m", replicas=replicas, **more), idle_s=idle_s)
        super().__init__(hosts, [(model, True)])
        policy = self.control.policy
        self.settle()
        self.control.policy = policy

    @property
    def alive(self) -> LivingRun:
        run = self.control.training.alive
        assert run is not None
        return run

    def begin(self, who: str = "me") -> LivingRun:
        placement = self.control.placement
        layers = {} if placement is None else placement.layers
        unix_s = DAY_S + self.now
        run = self.control.training.begin("m", layers, who=who, unix_s=unix_s, now=self.now)
        self.keep_updates()
        return run

    def tick(self, late: frozenset[str] = frozenset(), seconds: float = 0.5) -> bool:
        acted = super().tick(late, seconds)
        self.keep_updates()  # what the shell does before anybody hears of it
        return acted

    def own(self, name: str, count: int = 1) -> None:
        host = self.hosts[name]
        if host.alive:
            host.run, host.owned = self.alive.run, count

    def commit(self, names: Collection[str] | None = None) -> int:
        """The replicas on these hosts (None: all) get the run's next version; return its number."""
        run = self.alive
        for key, layer in self.published[-1].layers.items():
            for expert, replicas in enumerate(layer.replicas):
                one = ExpertVersion(key.expert(expert), run.next_version)
                for replica in replicas:
                    if names is None or replica.host in names:
                        self._bring(replica.host, one, run.run)
        return run.next_version

    def _bring(self, name: str, one: ExpertVersion, run: int) -> None:
        host = self.hosts[name]
        there = {version for key, version in host.held if key == one.key}
        if host.alive and (one.version in there or len(there) < VERSIONS_AT_ONCE):
            assert self.brought.setdefault(one, run) == run, "a number names one content"
            host.held.add(one)

    def publish(self, version: int, timeout_s: float = 10.0) -> Publication:
        return self.control.training.publish(
            self.alive.run, version, until=self.now + timeout_s, now=self.now
        )

    def step(self) -> int:
        """One whole step: its version is served, and the one before is gone."""
        version = self.commit()
        asked = self.publish(version)
        self.tick()
        assert asked.served, asked.error
        self.rounds(1.5)
        assert not self.control.training.old_versions()
        return version

    def versions(self, name: str, key: ExpertKey) -> list[int]:
        """What a host holds of an expert."""
        return sorted(version for held, version in self.hosts[name].held if held == key)

    def try_to_update(self) -> None:
        """Somebody puts new weights of an expert, unless a run trains the model."""
        if self.control.training.alive is None:
            self.update([min(self.every())], in_file=False)

    def try_to(self, act: str) -> None:
        """A trainer's call, which may be refused."""
        try:
            if act == "begin":
                self.begin()
            elif act == "publish":
                self.publish(self.alive.next_version, timeout_s=2.0)
            elif act == "renew":
                self.control.training.renew(self.control.training.last_run, self.now)
        except ClusterError:
            return
