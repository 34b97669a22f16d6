"""What a run goes on from when the process that decided for it is gone.

Its successor is a run with a higher number. It sends `Succeed` to all hosts, which refuse orders of
older runs from then on. What they own says how far the run had come: masters of one version are
those of one commit. A commit that some host has carried out is carried out by all that are prepared
for it. If no host reports it, the step is done again: a run publishes a version only after all
owners have answered.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ...proto.errors import ClusterError
from ..expert_keys import SHARED, ExpertKey
from ..versions import WeightVersions
from .orders import Commit, Inherited
from .owners import Owners
from .run_plan import RunPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Inheritance:
    """What hosts have answered, by host."""

    found: Mapping[str, Inherited]
    served: WeightVersions  # of the model
    keys: Collection[ExpertKey]  # all that the run trains

    def check(self, plan: RunPlan) -> None:
        """Raise ClusterError if the run before trains other tensors than a plan says."""
        for host, one in self.found.items():
            for key, groups in one.groups.items():
                due = plan.tensors[key].groups if key in plan.tensors else {}
                if groups != due:
                    raise ClusterError(
                        f"the run to be followed trains {sorted(groups)} of {key} in groups "
                        f"{sorted(set(groups.values()))} ({host}), and this one {sorted(due)} in "
                        f"{sorted(set(due.values()))}; begin with the same parameters and groups"
                    )

    @property
    def newest(self) -> int:
        """The newest version that some owner has; 0 if there is no owner."""
        return max((v for one in self.found.values() for v in one.versions.values()), default=0)

    @property
    def is_published(self) -> bool:
        """Whether the newest version is served, or one of those that are."""
        return self.newest <= max(map(self.served.of, self.keys), default=0)

    @property
    def step(self) -> int:
        """The steps that have led to the newest version."""
        steps = [a.step for a in self.found.values() if self.newest in a.versions.values()]
        return max(steps, default=0)

    def unfinished(self) -> tuple[Commit, list[str]] | None:
        """Return the last commit, and the hosts that are prepared for it; None: there are none."""
        commits = [one.committed for one in self.found.values()]
        last = next((one for one in commits if one and one.version == self.newest), None)
        if last is None:
            return None
        hosts = [host for host, one in self.found.items() if one.prepared == last.attempt]
        return (last, hosts) if hosts else None

    def finished(self, commit: Commit, hosts: Collection[str]) -> Inheritance:
        """Return what is there when hosts have carried out a commit."""
        done = {
            host: self.found[host]._replace(
                versions=dict.fromkeys(self.found[host].versions, commit.version),
                step=commit.step,
                committed=commit,
                prepared=None,
            )
            for host in hosts
        }
        return Inheritance(found={**self.found, **done}, served=self.served, keys=self.keys)

    def owners(self) -> Owners:
        """Return the hosts that have the state after the last commit, by key."""
        published, newest = self.is_published, self.newest

        def having(key: ExpertKey) -> list[str]:
            version = self.served.of(key) if published else newest
            return [h for h, one in sorted(self.found.items()) if one.versions.get(key) == version]

        found = {key: having(key) for key in self.keys}
        # A host that was about to become an owner may lack what an expert shares with others; the
        # one before has not forgotten anything yet.
        whole = {key: found.get(key._replace(expert=SHARED)) for key in self.keys}
        return {
            key: tuple(h for h in hosts if (shared := whole[key]) is None or h in shared)
            for key, hosts in found.items()
        }

    def left(self) -> dict[str, set[ExpertKey]]:
        """Return what hosts own that is of an earlier commit, and to be forgotten."""
        owners = self.owners()
        left = {
            host: {key for key in one.versions if host not in owners.get(key, ())}
            for host, one in self.found.items()
        }
        return {host: keys for host, keys in left.items() if keys}
