"""Why a part of a cluster did not start, in its own words.

Ray and Serve tell whoever waits for a process that it failed, and of its error a traceback at most.
So each part leaves its error in Ray's key-value store, and the process that starts the cluster
reads it there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

from ray.exceptions import RayError
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

from ...proto.errors import in_words
from .ray_border import cluster_of

PartKind = Literal["host", "trunk", "router", "ingress"]
# What comes later fails because of what comes first.
_ORDER: tuple[PartKind, ...] = ("host", "trunk", "router", "ingress")
_PREFIX = "failed-start-"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StartFailure:
    """One part that ended while it started."""

    kind: PartKind
    name: str  # of a host, or of a trunk's model
    words: str  # type and message of its error

    @property
    def part(self) -> str:
        match self.kind:
            case "host":
                return self.name
            case "trunk":
                return f"the trunk of model {self.name!r}"
            case "router":
                return "the router service"
            case "ingress":
                return "the ingress"

    def describe(self, cluster: str) -> str:
        """A sentence with the way to its log."""
        said = f"{self.part} did not start: {self.words}"
        if self.kind == "router":
            return said
        of = f"--host {self.name}" if self.kind == "host" else self.kind
        return f"{said}; {log_of(of, cluster)}"


def log_of(what: str, cluster: str) -> str:
    """Where to read on."""
    name = "" if cluster == "local" else f" --name {cluster}"
    return f"`moesaic logs {what}{name}` has more"


@contextmanager
def telling(namespace: str, kind: PartKind, name: str) -> Iterator[None]:
    """Around what a part does to start: leaves what it raises for `start_failures`."""
    try:
        yield
    except Exception as error:
        value = json.dumps(asdict(StartFailure(kind, name, in_words(error))))
        key = f"{_PREFIX}{kind}-{name}"
        try:
            _internal_kv_put(key, value, overwrite=True, namespace=namespace)
        except (RayError, ConnectionError, RuntimeError):
            # Ray says the rest of it.
            log.exception("it cannot be told why %s %s of %s failed", kind, name, namespace)
        raise


def start_failures(namespace: str) -> list[StartFailure]:
    """What `telling` has left, causes first."""
    found = []
    for key in _internal_kv_list(_PREFIX, namespace=namespace):
        value = _internal_kv_get(key, namespace=namespace)
        if value:
            found.append(StartFailure(**json.loads(value)))
    return sorted(found, key=lambda one: (_ORDER.index(one.kind), one.name))


def forget_start_failures(namespace: str) -> None:
    _internal_kv_del(_PREFIX, del_by_prefix=True, namespace=namespace)


def describe_failures(namespace: str) -> str:
    """A sentence for the first cause of each kind; empty if nothing was told."""
    told = start_failures(namespace)
    first = [one for one in told if one.kind == told[0].kind]
    more = f" ({len(first) - 1} more failed like it)" if len(first) > 1 else ""
    return first[0].describe(cluster_of(namespace)) + more if first else ""
