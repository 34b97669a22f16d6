"""What a host has added up of a training step.

A step is tried until it can be committed; each try is an attempt. A backward call names its attempt
and the part of a layer's call that it is. The host answers every such call, and adds the gradients
of its experts up once, however often the part comes: an answer may be lost on its way. A call of
another attempt than the one under way is refused, so that what was sent before a failure is never
added to what comes after it. When the gradients are gathered, the attempt is closed: nothing is
added any more.

The host forgets what it has added up when another attempt begins.
"""

from __future__ import annotations

from typing import NamedTuple

from ...proto.errors import InternalError, NotHere, Superseded
from ..expert_keys import LayerKey


class Attempt(NamedTuple):
    """An attempt at a step of a run, in the order in which they follow each other."""

    run: int  # grows from run to run
    step: int
    number: int

    def __str__(self) -> str:
        return f"attempt {self.number} at step {self.step} of run {self.run}"


class Part(NamedTuple):
    """What is computed at once: the rows of one layer that went to one host, or a piece of them."""

    layer: LayerKey
    worker: int  # whose microbatch it is
    microbatch: int
    number: int


class Contributions:
    """The parts of the attempt under way."""

    def __init__(self) -> None:
        self.attempt: Attempt | None = None
        self._added: set[Part] = set()
        self._broken = ""  # why the sums are not to be used
        self._closed = False
        self._forgotten = False

    @property
    def parts(self) -> int:
        """How many parts were added up."""
        return len(self._added)

    def begin(self, attempt: Attempt) -> bool:
        """Begin an attempt; return whether what was added up is to be forgotten.

        The one that is under way goes on, unless it was forgotten. Raises Superseded for one that
        came before it.
        """
        if self.attempt is not None and attempt < self.attempt:
            raise Superseded(f"{attempt} is over: {self.attempt} is under way")
        if attempt == self.attempt and not self._forgotten:
            return False
        self.attempt = attempt
        self._added.clear()
        self._broken = ""
        self._closed = self._forgotten = False
        return True

    def check(self, attempt: Attempt) -> None:
        """Raise NotHere unless this attempt is under way, and takes gradients."""
        self._check_current(attempt)
        if self._closed:
            raise NotHere(f"{attempt} takes no more gradients: it is closed")

    def admit(self, attempt: Attempt, part: Part) -> bool:
        """Return whether a part's gradients are to be added up now; they are, the first time.

        Raises NotHere as `check` does.
        """
        self.check(attempt)
        if part in self._added:
            return False
        self._added.add(part)
        return True

    def break_off(self, why: str) -> None:
        """Take note that a part was not added up as a whole."""
        self._broken = self._broken or why

    def close(self, attempt: Attempt) -> None:
        """Take no more gradients in an attempt; closing it again does nothing.

        Raises NotHere unless it is under way, and InternalError if its sums are not to be used.
        """
        self._check_current(attempt)
        if self._broken:
            raise InternalError(f"{attempt}: its gradients are not whole: {self._broken}")
        self._closed = True

    def forget(self) -> None:
        """Take no more gradients in the attempt under way, if there is one: its run is over.

        A host that comes back to a run may begin the same attempt anew.
        """
        self._added.clear()
        self._closed = self._forgotten = True

    def _check_current(self, attempt: Attempt) -> None:
        if attempt != self.attempt:
            found = (
                "none has begun here" if self.attempt is None else f"{self.attempt} is under way"
            )
            raise NotHere(f"{attempt}: {found}")
