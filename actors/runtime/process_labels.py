"""The line that each process of a cluster prints first, by which its log files are found.

It tells them from those of Ray's other workers, even after the process has died.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, cast, get_args

Kind = Literal["host", "controller", "trunk", "ingress", "router"]

_SAID = re.compile(rf"^moesaic: ({'|'.join(get_args(Kind))}) (\S+) of (\S+)$", re.MULTILINE)


class Process(NamedTuple):
    """One process of a cluster."""

    kind: Kind
    name: str
    cluster: str


def announce(kind: Kind, name: str, cluster: str) -> None:
    """Print the line; call this once, as soon as the process knows what it is."""
    print(f"moesaic: {kind} {name} of {cluster}", flush=True)


def announced(text: str) -> Process | None:
    """Return the process whose log begins with ``text``; None: it is not one of a cluster."""
    found = _SAID.search(text)
    if found is None:
        return None
    kind, name, cluster = found.groups()
    return Process(cast(Kind, kind), name, cluster)
