"""Records of why a part of a cluster did not start, with the part's own error.

Ray and Serve report only that a process failed, with a traceback at most. So each part stores its
error in Ray's key-value store, and the process that starts the cluster reads it there.
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

from ...proto.errors import describe_error
from ..runtime.ray_border import cluster_of

PartKind = Literal["host", "trunk", "router", "ingress"]
# A part that comes later here may have failed because an earlier one did.
_ORDER: tuple[PartKind, ...] = ("host", "trunk", "router", "ingress")
_PREFIX = "failed-start-"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StartFailure:
    """One part that ended while it started."""

    kind: PartKind
    name: str  # of a host, or of a trunk's model
    message: str  # type and message of its error

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
        """Say in a sentence why the part did not start, and which command shows its log."""
        said = f"{self.part} did not start: {self.message}"
        of = f"--host {self.name}" if self.kind == "host" else self.kind
        return f"{said}; {log_of(of, cluster)}"


def log_of(what: str, cluster: str) -> str:
    """Name the command that shows the log of ``what``."""
    name = "" if cluster == "local" else f" --name {cluster}"
    return f"`moesaic logs {what}{name}` has more"


@contextmanager
def recording_failure(namespace: str, kind: PartKind, name: str) -> Iterator[None]:
    """Run a part's start in this block; an error is stored for `start_failures` and raised."""
    try:
        yield
    except Exception as error:
        # Whatever it is, it is told and raised again.
        value = json.dumps(asdict(StartFailure(kind, name, describe_error(error))))
        key = f"{_PREFIX}{kind}-{name}"
        try:
            _internal_kv_put(key, value, overwrite=True, namespace=namespace)
        except (RayError, ConnectionError, RuntimeError):
            # The cause itself is raised below, so Ray logs it.
            log.exception("cannot store why %s %s of %s failed", kind, name, namespace)
        raise


def start_failures(namespace: str) -> list[StartFailure]:
    """Return what `recording_failure` has stored, likely causes first."""
    found = []
    for key in _internal_kv_list(_PREFIX, namespace=namespace):
        value = _internal_kv_get(key, namespace=namespace)
        if value:
            found.append(StartFailure(**json.loads(value)))
    return sorted(found, key=lambda one: (_ORDER.index(one.kind), one.name))


def forget_start_failures(namespace: str) -> None:
    _internal_kv_del(_PREFIX, del_by_prefix=True, namespace=namespace)


def describe_failures(namespace: str) -> str:
    """Describe the first failure of the earliest kind, and count its like; empty if none."""
    told = start_failures(namespace)
    first = [one for one in told if one.kind == told[0].kind]
    more = f" ({len(first) - 1} more failed like it)" if len(first) > 1 else ""
    return first[0].describe(cluster_of(namespace)) + more if first else ""
