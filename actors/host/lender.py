"""Lends the memory of a host's experts to the routers of its machine that ask for it."""

from __future__ import annotations

import os

from ...proto.errors import HostLost
from ..transport.base import Session
from ..transport.shm import ShmSession
from .expert_memory import ExpertMemory
from .weight_store import ExpertStore


class Lender:
    """Which routers borrow, and what each of them was lent; used by the host's loop alone."""

    def __init__(self, store: ExpertStore) -> None:
        self._store = store
        self._lent: dict[ShmSession, set[ExpertMemory]] = {}

    def add(self, session: Session) -> None:
        """Lend to this router from now on, if its transport can carry descriptors."""
        if isinstance(session, ShmSession):
            self._lent[session] = set()

    def gone(self, session: Session) -> None:
        if isinstance(session, ShmSession):
            self._lent.pop(session, None)

    def lend(self) -> list[tuple[Session, HostLost]]:
        """Lend what is new, and return the routers that were lost by it.

        A model's memory comes with its first expert; a router may have asked long before.
        """
        lost: list[tuple[Session, HostLost]] = []
        for model, memory in self._store.memories() if self._lent else ():
            for session in [one for one, lent in self._lent.items() if memory not in lent]:
                descriptor = memory.lend()
                if descriptor is None:
                    break
                try:
                    session.lend(model, descriptor)
                    self._lent[session].add(memory)
                except HostLost as error:
                    del self._lent[session]
                    lost.append((session, error))
                finally:
                    os.close(descriptor)
        return lost
