"""The line that each process of a cluster prints first, by which its log files are found.

It tells them from those of Ray's other workers, even after the process has died.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, cast, get_args

ProcessKind = Literal["host", "controller", "trunk", "ingress", "router", "run", "worker"]

_SAID = re.compile(rf"^moesaic: ({'|'.join(get_args(ProcessKind))}) (\S+) of (\S+)$", re.MULTILINE)


class ProcessLabel(NamedTuple):
    """One process of a cluster."""

    kind: ProcessKind
    name: str
    cluster: str


def announce(kind: ProcessKind, name: str, cluster: str) -> None:
    """Print the line; call this once, as soon as the process knows what it is."""
    print(f"moesaic: {kind} {name} of {cluster}", flush=True)


def announced(text: str) -> ProcessLabel | None:
    """Return the process whose log begins with ``text``; None: it is not one of a cluster."""
    found = _SAID.search(text)
    if found is None:
        return None
    kind, name, cluster = found.groups()
    return ProcessLabel(cast(ProcessKind, kind), name, cluster)
