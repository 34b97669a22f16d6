"""Which controller a host obeys, and which of its orders are still good.

Two controllers can be alive at once, when the older one is wrongly taken for dead, and an order
can come late, when a host was frozen. What a host reports is only worth something if nothing that
was ordered before can undo it behind the report. So every report begins with the term of who asks,
after which older terms are over, and with the number of evictions that it does not wait for any
more, after which these are void.
"""

from __future__ import annotations

from ...proto.errors import Expired, Superseded


class Fence:
    """One host's; used under a lock with what it protects."""

    def __init__(self) -> None:
        self.term = 0
        self._given_up = 0

    def obey(self, term: int) -> None:
        """An order of the controller of ``term``. Raises Superseded for an older one."""
        if term < self.term:
            raise Superseded(f"term: {term} is over; the controller of term {self.term} rules")
        if term > self.term:
            self.term, self._given_up = term, 0

    def look(self, term: int, given_up: int) -> None:
        """A controller asks for a report: evictions up to the number ``given_up`` are void.
        Raises Superseded."""
        self.obey(term)
        self._given_up = max(self._given_up, given_up)

    def evict(self, term: int, number: int) -> None:
        """The eviction of this number is to be done now. Raises Superseded and Expired."""
        self.obey(term)
        if number <= self._given_up:
            raise Expired(f"eviction {number}: its controller does not wait for it any more")
