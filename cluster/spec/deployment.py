"""What a cluster is to be: its spec, and what was found out when it was asked for.

A controller that starts anew, an ingress, and a command without a session file know the cluster
from this record alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from urllib.parse import urlsplit

from pydantic import TypeAdapter, ValidationError

from ...proto.errors import ClusterError
from ..placement import ModelRef, ModelShape
from .monitoring import MonitoringSpec
from .spec import HostGroup, Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployedModel:
    """A model of the spec, as its folder describes it."""

    ref: ModelRef
    shape: ModelShape
    top_k: int | None  # experts per token, as the model itself says; None: unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedEndpoint:
    """Where the endpoint is, and its monitoring."""

    host: str  # at which Serve listens
    url: str
    monitoring: MonitoringSpec | None  # with the port that it has
    monitoring_url: str | None

    @property
    def own_hosts(self) -> set[str]:
        """The hosts in the addresses that clients are told."""
        urls = [url for url in (self.url, self.monitoring_url) if url is not None]
        return {urlsplit(url).hostname or "" for url in urls}


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A cluster as it was last asked for.

    A host group keeps its number as long as it has hosts. The spec's groups are those of ``order``;
    the hosts of other groups are leaving.
    """

    id: str  # another one for each cluster, whatever its name
    spec: Spec
    models: Sequence[DeployedModel]  # those of the spec, in its order
    groups: Mapping[int, HostGroup]
    order: Sequence[int]
    trunk_threads: int = 1  # of each trunk
    # Of every process of the cluster: what whoever started it said of logs.
    log_environment: Mapping[str, str] = field(default_factory=dict)
    endpoint: PlacedEndpoint | None = None
    router: str | None = None  # host:port of the router service

    @property
    def names(self) -> Collection[str]:
        """The names of the models."""
        return [model.ref.name for model in self.models]

    @property
    def as_stored(self) -> Deployment:
        """This deployment as a reader of its JSON has it, to be compared with such a one.

        A default of 0 for a float, say, has become 0.0.
        """
        return Deployment.from_json(self.to_json())

    def is_like(self, other: Deployment) -> bool:
        """Return whether both say the same, but for groups that are leaving."""
        return self._own() == other._own()

    def _own(self) -> str:
        return replace(self, groups={n: self.groups[n] for n in sorted(self.order)}).to_json()

    def to_json(self) -> str:
        return _FORM.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Deployment:
        """Read what `to_json` wrote. Raises ClusterError for the text of another version."""
        try:
            return _FORM.validate_json(text)
        except ValidationError as error:
            raise ClusterError(
                f"the cluster's stored state is not of this version of Moesaic ({error}); end the "
                "cluster with the version that started it"
            ) from error


_FORM = TypeAdapter(Deployment)


def version_of(part: object) -> str:
    """Return a short text that is another one if what a part has taken over is."""
    return hashlib.sha256(repr(part).encode()).hexdigest()[:16]


def host_part(spec: Spec, group: HostGroup) -> object:
    """Return what a host takes over when it starts; for more, there has to be another host."""
    lends = spec.lending_of(group) != "never"
    return (
        (group.num_cpus, group.num_gpus, group.resources, group.labels),
        (group.device, group.threads, group.limits, group.placement_group),
        (spec.network.bind, spec.network.transport, lends),
        spec.balance.host_timeout_s if lends else None,
        group.card_share("hosts", trains=spec.trains),
    )


def regrouped(before: Deployment, spec: Spec) -> tuple[dict[int, HostGroup], tuple[int, ...]]:
    """Return the numbered groups for another spec of a cluster, and the numbers of the spec's own.

    A group of the spec keeps the number, and so the hosts, of one whose hosts are like its own:
    that at its place, or else any other that has no place yet. Other groups get new numbers.
    """
    parts = {number: host_part(before.spec, one) for number, one in before.groups.items()}
    wanted = [host_part(spec, group) for group in spec.hosts]
    order: list[int | None] = [
        number if number is not None and parts[number] == part else None
        for part, number in zip_longest(wanted, before.order[: len(wanted)])
    ]
    groups = dict(before.groups)
    for place, part in enumerate(wanted):
        if order[place] is None:
            alike = [n for n in parts if n not in order and parts[n] == part]
            order[place] = alike[0] if alike else max(groups) + 1
        groups[order[place] or 0] = spec.hosts[place]
    return groups, tuple(number or 0 for number in order)
