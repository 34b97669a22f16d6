"""Connections for weights that are kept for the next transfer: making one takes 10 ms."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from ....cluster.placement import HostEntry
from ....proto.keys import ClusterSecret
from ....proto.limits import BULK_IDLE_S
from .weights import WeightsLink


class WeightsLinks:
    """Connections to hosts of other nodes. Each transfer has one for itself."""

    def __init__(self, secret: ClusterSecret) -> None:
        self._secret = secret
        self._lock = threading.Lock()
        self._idle: list[_Kept] = []  # the one used last is at the end
        self._closed = False

    @contextlib.contextmanager
    def to(self, entry: HostEntry) -> Iterator[WeightsLink]:
        """Give an idle connection to this incarnation of a host, or a new one.

        It is kept for the next transfer, if there was no error.
        """
        link = self._take(entry)
        if link is None:
            proof = self._secret.proof("weights", entry.target)
            link = _Kept(entry.host, entry.target, WeightsLink(entry.grpc_address, proof))
        sound = False
        try:
            yield link.link
            sound = True
        finally:
            with self._lock:
                sound = sound and not self._closed
                if sound:
                    self._idle.append(link._replace(used_at=time.monotonic()))
            if not sound:
                link.link.close()

    def close(self) -> None:
        """End idle connections; the others end with their transfers."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for one in idle:
            one.link.close()

    def _take(self, entry: HostEntry) -> _Kept | None:
        now = time.monotonic()
        with self._lock:
            stale = [
                one
                for one in self._idle
                if (one.host == entry.host and one.target != entry.target)
                or now - one.used_at > BULK_IDLE_S
            ]
            self._idle = [one for one in self._idle if one not in stale]
            fitting = [one for one in self._idle if one.target == entry.target]
            if fitting:
                self._idle.remove(fitting[-1])
        for one in stale:
            one.link.close()
        return fitting[-1] if fitting else None


class _Kept(NamedTuple):
    host: str
    target: str  # of one incarnation
    link: WeightsLink
    used_at: float = 0.0  # of time.monotonic
