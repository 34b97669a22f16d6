"""One layer's call in progress, as the router's state machine sees it, and how it ended.

Shape suffixes: N = T * K choices flattened, n = some of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..placement import LayerKey
from .events import Refused, Send
from .row_grouping import rows_of

_NONE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended. ``lost`` are the choices (numbers in N) that nobody computed in time."""

    lost: np.ndarray
    error: Refused | None = None  # a refusal that no other host would answer differently

    @property
    def ok(self) -> bool:
        return self.error is None and self.lost.size == 0


@dataclass(slots=True)
class Flight:
    """A send that has no answer yet."""

    send: Send
    sent_at: float
    expires: float
    hedge_at: float  # when another replica is asked, too
    rival: int | None = None  # the send in flight whose choices this one repeats
    hedges: set[int] = field(default_factory=set)  # sends in flight that repeat some of its choices


@dataclass(slots=True)
class LayerCall:
    """One layer's call in progress. Every choice waits, is in flight, was accepted or has failed;
    what is in flight a second time, as a hedge, counts once."""

    key: LayerKey
    top_k: int
    max_rows: int
    deadline: float
    rotation: int
    ids_N: np.ndarray
    waiting_N: np.ndarray  # choices that no send carries, ascending
    # Seconds that each token waits for experts that nobody has; None: until the deadline.
    patience_T: np.ndarray | None = None
    # Those of the waiting that no host takes now, and since when there are any: the others wait for
    # room on a host that has it.
    nowhere_N: np.ndarray = field(default_factory=lambda: _NONE)
    nowhere_since: float = 0.0
    gone: list[np.ndarray] = field(default_factory=list)  # choices that wait no longer
    live: dict[int, Flight] = field(default_factory=dict)  # by sequence number
    # Given up after a deadline; a late answer still counts if nobody else has its choices.
    given_up: dict[int, Send] = field(default_factory=dict)
    avoid: set[tuple[str, int]] = field(default_factory=set)  # (host, expert) refused
    # Hosts that lack one of several experts: asked for each by itself, to learn which.
    apart: set[str] = field(default_factory=set)
    # Refused for a reason that holds for every host.
    failed: list[tuple[Send, Refused]] = field(default_factory=list)
    misses: int = 0
    attempts: int = 0  # sends that came to nothing, other than through the loss of a host
    hold_until: float = 0.0  # no retry before: the budget is spent

    def ended(self) -> Outcome:
        """What became of it, once nothing is under way any more."""
        lost = [self.waiting_N, *self.gone, *(send.choices for send, _ in self.failed)]
        error = self.failed[0][1] if self.failed else None
        return Outcome(np.sort(np.concatenate(lost)), error)

    def pieces(self, host: str, mine: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """The choices ``mine`` as the rows of one send to ``host`` or of several."""
        if host not in self.apart:
            return rows_of(mine, self.top_k, self.max_rows)
        ids_n = self.ids_N[mine]
        groups = [mine[ids_n == expert] for expert in np.unique(ids_n)]
        return [piece for one in groups for piece in rows_of(one, self.top_k, self.max_rows)]

    def wait_again(self, choices: np.ndarray) -> None:
        self.waiting_N = np.sort(np.concatenate([self.waiting_N, choices]))

    def take(self, seq: int, answered: np.ndarray | None = None) -> bool:
        """Take a send that gets no answer, or one too late, out of flight. What nobody else
        carries, and is not in ``answered``, waits again; False if that is nothing."""
        flight = self.live.pop(seq)
        if flight.rival is not None:
            self.live[flight.rival].hedges.discard(seq)
            return False
        carried = [] if answered is None else [answered]
        for hedge in flight.hedges:
            self.live[hedge].rival = None
            carried.append(self.live[hedge].send.choices)
        left = flight.send.choices
        if carried:
            left = np.setdiff1d(left, np.concatenate(carried), assume_unique=True)
        if left.size:
            self.wait_again(left)
        return left.size > 0

    def end(self, seq: int) -> list[Send]:
        """A send needs no more answers: it is out of flight, and so are its hedges, given back."""
        return [self.live.pop(hedge).send for hedge in sorted(self.live.pop(seq).hedges)]

    def take_late(self, seq: int) -> Send | None:
        """A send that was given up and is answered now, if nobody else has its choices."""
        late = self.given_up.pop(seq, None)
        if late is None or not np.isin(late.choices, self.waiting_N).all():
            return None
        self.waiting_N = np.setdiff1d(self.waiting_N, late.choices, assume_unique=True)
        return late

    def nowhere(self, choices: np.ndarray, now: float) -> None:
        """Of the waiting choices, no host takes these now."""
        if not self.nowhere_N.size:
            self.nowhere_since = now
        self.nowhere_N = choices

    def lose_patience(self, now: float) -> None:
        """Choices that nobody takes, of tokens that wait no longer, are lost."""
        if self.nowhere_N.size:  # some may have been answered late since
            self.nowhere_N = np.intersect1d(self.nowhere_N, self.waiting_N, assume_unique=True)
        if self.patience_T is not None and self.nowhere_N.size:
            over_n = self.nowhere_since + self._patience(self.nowhere_N) <= now
            self.gone.append(self.nowhere_N[over_n])
            self.waiting_N = np.setdiff1d(self.waiting_N, self.gone[-1], assume_unique=True)
            self.nowhere_N = self.nowhere_N[~over_n]

    def _patience(self, choices: np.ndarray) -> np.ndarray:
        assert self.patience_T is not None
        return self.patience_T[choices // self.top_k]

    def wake_at(self, now: float) -> float:
        """When something is due: an end of patience, a hedge, a retry that was held back."""
        due = [self.deadline]
        due += [min(flight.expires, flight.hedge_at) for flight in self.live.values()]
        if self.nowhere_N.size and self.patience_T is not None:
            due.append(self.nowhere_since + float(self._patience(self.nowhere_N).min()))
        if self.waiting_N.size and self.hold_until > now:
            due.append(self.hold_until)
        return min(due)

    def stop(self) -> list[Send]:
        """Nothing is in flight any more; gives what was."""
        sends = [flight.send for flight in self.live.values()]
        pending = [send.choices for send in sends]
        self.waiting_N = np.unique(np.concatenate([self.waiting_N, *pending]))
        self.live.clear()
        return sends

    def not_here(self, send: Send) -> None:
        """A host lacks an expert of ``send``; which, it says only when asked for one alone."""
        experts = np.unique(self.ids_N[send.choices])
        if experts.size == 1:
            self.avoid.add((send.host, int(experts[0])))
        else:
            self.apart.add(send.host)
