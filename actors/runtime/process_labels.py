"""What each process of a cluster says of itself on its stdout, so that its log files are found
among those of Ray's other workers, also when it is dead."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, cast

Kind = Literal["host", "controller", "trunk", "ingress"]

_SAID = re.compile(r"^moesaic: (host|controller|trunk|ingress) (\S+) of (\S+)$", re.MULTILINE)


class Process(NamedTuple):
    """A part of a cluster."""

    kind: Kind
    name: str
    cluster: str


def announce(kind: Kind, name: str, cluster: str) -> None:
    """To be called once, as soon as the process knows what it is."""
    print(f"moesaic: {kind} {name} of {cluster}", flush=True)


def announced(text: str) -> Process | None:
    """Whose the log is that begins with ``text``; None: not one of ours."""
    found = _SAID.search(text)
    if found is None:
        return None
    kind, name, cluster = found.groups()
    return Process(cast(Kind, kind), name, cluster)
