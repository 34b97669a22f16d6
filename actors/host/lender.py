"""Lends the memory of a host's experts to the routers of its machine that ask for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from ...proto.errors import HostLost
from ..transport.base import LendingSession, Session
from ..transport.seqpacket import MOST_DESCRIPTORS, close_all
from .memory.expert_memory import ExpertMemory
from .weight_store import ExpertStore

log = logging.getLogger(__name__)

# After an error of this process or machine, such as no free descriptors.
_RETRY_S = 5.0


class Lender:
    """Which routers borrow, and what each of them was lent; used by the host's loop alone."""

    def __init__(self, store: ExpertStore, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._paused = False
        self._retry_at = clock()
        # And of the memory which chunks, {number: serial}.
        self._lent: dict[LendingSession, dict[ExpertMemory, Mapping[int, int]]] = {}

    def add(self, session: Session) -> None:
        """Lend to this router from now on, if its transport can carry descriptors."""
        if isinstance(session, LendingSession):
            self._lent.setdefault(session, {})

    def gone(self, session: Session) -> None:
        if isinstance(session, LendingSession):
            self._lent.pop(session, None)

    def pause(self, paused: bool) -> list[tuple[Session, HostLost]]:
        """Take back everything, and lend nothing until the pause ends; return lost routers."""
        lost: list[tuple[Session, HostLost]] = []
        self._paused = paused
        for session, lent in list(self._lent.items()) if paused else ():
            try:
                for model, memory in self._store.memories():
                    if memory in lent:
                        session.take_back(model)
                lent.clear()
            except HostLost as error:
                del self._lent[session]
                lost.append((session, error))
        return lost

    def lend(self) -> list[tuple[Session, HostLost]]:
        """Lend what is new, and return the routers that were lost by it.

        A model's memory comes with its first expert; a router may have asked long before.
        """
        lost: list[tuple[Session, HostLost]] = []
        if self._paused or not self._lent or self._clock() < self._retry_at:
            return lost
        for model, memory in self._store.memories():
            for session in list(self._lent):
                try:
                    if not self._lend(session, model, memory):
                        break
                except OSError as error:
                    # Routers go on sending their calls.
                    self._retry_at = self._clock() + _RETRY_S
                    log.warning("%s cannot be lent at the moment: %s", model, error)
                    return lost
                except HostLost as error:
                    del self._lent[session]
                    lost.append((session, error))
        return lost

    def _lend(self, session: LendingSession, model: str, memory: ExpertMemory) -> bool:
        """Lend a router what is new of a model; return whether there is anything of it."""
        lent = self._lent[session]
        if memory not in lent:
            descriptor = memory.lend()
            if descriptor is None:
                return False
            _hand_over(session, model, [descriptor], [])
            lent[memory] = {}
        known, there = lent[memory], memory.chunks()
        if there is known:
            return True
        if gone := known.items() - there.items():
            session.take_back(model, sorted(gone))
        new = sorted(there.items() - known.items())
        for start in range(0, len(new), MOST_DESCRIPTORS):
            chunks, descriptors = [], []
            for chunk in new[start : start + MOST_DESCRIPTORS]:
                descriptor = memory.lend_chunk(*chunk)
                if descriptor is not None:
                    chunks.append(chunk)
                    descriptors.append(descriptor)
            if chunks:
                _hand_over(session, model, descriptors, chunks)
        lent[memory] = there
        return True


def _hand_over(
    session: LendingSession, model: str, descriptors: list[int], chunks: list[tuple[int, int]]
) -> None:
    try:
        session.lend(model, descriptors, chunks)
    finally:
        close_all(descriptors)
