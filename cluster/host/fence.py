"""Decide which controller a host obeys, and which of its commands are still valid.

Two controllers can be alive at once, if the older one was wrongly taken for dead. A command can
arrive late, if the host was frozen. A controller can rely on a host's report only if no earlier
command can change the host after it. So a controller that asks for a report sends its term and the
number of the last eviction that it no longer waits for. From then on the host refuses commands of
older terms, and evictions up to that number.
"""

from __future__ import annotations

from ...proto.errors import Expired, Superseded


class Fence:
    """The fence of one host; used under the same lock as the state that it protects."""

    def __init__(self) -> None:
        self.term = 0
        self._given_up = 0

    def obey(self, term: int) -> None:
        """Accept a command of the controller of ``term``; raise Superseded for an older term."""
        if term < self.term:
            raise Superseded(
                f"term: {term} has ended; this host obeys the controller of term {self.term}"
            )
        if term > self.term:
            self.term, self._given_up = term, 0

    def look(self, term: int, given_up: int) -> None:
        """Accept a request for a report, and void evictions up to the number ``given_up``.

        Raises Superseded.
        """
        self.obey(term)
        self._given_up = max(self._given_up, given_up)

    def evict(self, term: int, number: int) -> None:
        """Accept the eviction of this number; raise Superseded or Expired if it is not valid."""
        self.obey(term)
        if number <= self._given_up:
            raise Expired(f"eviction {number}: its controller no longer waits for it")
