"""What Ray keeps for a cluster: the controller's name, and the key-value store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..plan import Wishes

if TYPE_CHECKING:
    from .controller import SimController


class Registry:
    """Never fails; single operations are atomic, sequences of them are not."""

    def __init__(self) -> None:
        self.controller: SimController | None = None
        self.latest_term = 0
        self.wishes = Wishes()
        self.fleet = ""  # as JSON
        self.let_go: dict[str, float] = {}  # hosts that may end; when their reports were asked for
        self._terms: set[int] = set()

    def put_term(self, term: int) -> bool:
        """Put if absent; whether it was."""
        absent = term not in self._terms
        self._terms.add(term)
        return absent
