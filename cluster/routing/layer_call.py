"""One layer's call in progress, and its outcome: bookkeeping of the router's state machine.

An assignment (a token and one of its experts) is numbered t * K + k, for K experts of each token.
Names call it `assignment`; arrays of assignments hold these numbers.

Shape suffixes: N = T * K assignments flattened, n = some of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from ..expert_keys import LayerKey
from ..placement import HostEntry, PlacementId
from ..versions import LayerVersions
from .events import Refused, Send
from .host_health import HostHealth
from .row_grouping import SendRows, rows_of_groups

_NONE = np.zeros(0, dtype=np.int64)
# The number of a send that has not begun yet.
NOT_SENT = 0


@dataclass(frozen=True, slots=True)
class CallKind:
    """What a router may do for a call to be answered sooner."""

    hedges: bool  # a late send is repeated on another replica, and the first answer counts
    moves: bool  # what one host does not answer in time another computes, unless it does at last
    counts: bool  # its assignments are load, and its answers show how fast a host is
    # Which of an expert's rows are computed at once does not depend on hosts: all of the same
    # `ROWS_TOGETHER` tokens are.
    together: bool = False


# The same answer twice does no harm.
FORWARD = CallKind(hedges=True, moves=True, counts=True)
# A host that computes gradients also adds them up. So a part stays with the host that it was sent
# to, which knows it by its number, and is lost with it. Its tokens were counted on their way there.
BACKWARD = CallKind(hedges=False, moves=False, counts=False)
# The bits of an expert's gradient depend on which rows went through one product.
EXACT_BACKWARD = replace(BACKWARD, together=True)
# So few that they fit into one call to any host, whatever it is reached over.
ROWS_TOGETHER = 256


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended; ``lost`` has the assignments that no host computed in time, ascending."""

    lost: np.ndarray
    error: Refused | None = None  # a refusal that no other host would answer differently

    @property
    def ok(self) -> bool:
        return self.error is None and self.lost.size == 0


@dataclass(slots=True)
class InFlightSend:
    """A send that has no answer yet."""

    send: Send
    sent_at: float
    expires: float
    hedge_at: float  # when it is repeated on another replica
    rival: int | None = None  # in a hedge: the late send in flight that it repeats
    hedges: set[int] = field(default_factory=set)  # hedges in flight; each repeats a part of it


@dataclass(slots=True, eq=False)
class LayerCall:
    """One layer's call in progress, until it has an ``outcome``.

    Every assignment is in one of these states: waiting (``waiting_N``), in flight (``in_flight``),
    accepted, failed (``failed``) or given up (``out_of_patience``). An assignment that is in flight
    twice, in a send and in its hedge, counts once.
    """

    number: int
    kind: CallKind
    key: LayerKey
    top_k: int
    max_rows: int
    deadline: float
    rotation: int
    ids_N: np.ndarray
    waiting_N: np.ndarray  # assignments that are not in flight, ascending
    # How many experts the layer had when the waiting assignments were last checked against it.
    experts: int | None = None
    # Seconds that each token waits for a missing expert; None: until the deadline.
    patience_T: np.ndarray | None = None
    # Waiting assignments with no available replica, and since when there are any. The other waiting
    # assignments have one, and wait until it has room for another call.
    unavailable_N: np.ndarray = field(default_factory=lambda: _NONE)
    unavailable_since: float = 0.0
    out_of_patience: list[np.ndarray] = field(
        default_factory=list
    )  # assignments whose patience ended
    in_flight: dict[int, InFlightSend] = field(default_factory=dict)  # by sequence number
    # Sends that missed their deadline. A late answer still counts while all its assignments wait.
    given_up: dict[int, Send] = field(default_factory=dict)
    avoid: set[tuple[str, int]] = field(default_factory=set)  # (host, expert) refused
    # Hosts that refused a send because they lack one of its experts. They get one send for each
    # expert from now on, which shows which one they lack.
    one_expert_per_send: set[str] = field(default_factory=set)
    parts: int = 0  # sends that began; the next one's number, if it is not the same rows again
    # Sends that only their own host may compute, and that are to be sent there again, or as those
    # of an earlier call.
    again: list[Send] = field(default_factory=list)
    # Refused for a reason that holds for every host, or lost with the only host that counts.
    failed: list[tuple[Send, Refused]] = field(default_factory=list)
    misses: int = 0  # times that sends missed their deadline
    attempts: int = 0  # sends that failed for another reason than the loss of a host
    hold_until: float = 0.0  # no retry before this moment: the retry budget is spent
    # No send in flight is late before this moment. It may be too early, as it is not updated when
    # a send is answered.
    late_at: float = math.inf
    outcome: Outcome | None = None

    @property
    def tokens(self) -> int:
        return self.ids_N.size // self.top_k

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight, and nothing waits to be."""
        return not (self.waiting_N.size or self.in_flight or self.again)

    def knows(self, seq: int) -> bool:
        """Return whether this is a send of the call whose answer may still count."""
        return seq in self.in_flight or seq in self.given_up

    def end_now(self) -> None:
        """Set the outcome; call it when nothing is in flight any more."""
        error = self.failed[0][1] if self.failed else None
        if not (self.waiting_N.size or self.out_of_patience or self.failed):
            self.outcome = Outcome(_NONE)
            return
        lost = [
            self.waiting_N,
            *self.out_of_patience,
            *(send.assignments for send, _ in self.failed),
        ]
        self.outcome = Outcome(np.sort(np.concatenate(lost)), error)

    def pieces(
        self, hosts: Sequence[str], assignment_n: np.ndarray, host_n: np.ndarray
    ) -> Iterator[tuple[str, SendRows]]:
        """Yield (host, rows) of the sends that the assignments make.

        ``host_n`` has the index in ``hosts`` of each assignment's host, or -1 if it has none.
        """
        group_n = host_n
        if self.one_expert_per_send:
            # Groups above those of hosts: one for each expert on each of these hosts.
            for index, host in enumerate(hosts):
                if host in self.one_expert_per_send:
                    own_n = host_n == index
                    split_n = index + len(hosts) * (1 + self.ids_N[assignment_n])
                    group_n = np.where(own_n, split_n, group_n)
        if self.kind.together and self.tokens > self.max_rows:
            groups = len(hosts) * (1 + int(group_n.max(initial=0)) // len(hosts))
            later_n = groups * (assignment_n // self.top_k // self.max_rows)
            group_n = np.where(group_n < 0, group_n, group_n + later_n)
        for group, rows in rows_of_groups(
            assignment_n, group_n, self.ids_N, self.top_k, self.max_rows
        ):
            yield hosts[group % len(hosts)], rows

    def sent(self, flight: InFlightSend) -> None:
        self.in_flight[flight.send.seq] = flight
        self.late_at = min(self.late_at, flight.expires, flight.hedge_at)

    def begin_like(self, sends: Sequence[Send]) -> None:
        """Let rows go where those of an earlier call went, in the same sends."""
        if not sends:
            return
        self.again = [
            replace(send, call=self.number, seq=NOT_SENT, part=part)
            for part, send in enumerate(sends)
        ]
        self.parts = len(sends)
        sent = np.concatenate([send.assignments for send in sends])
        self.waiting_N = np.setdiff1d(self.waiting_N, sent, assume_unique=True)

    def placed_anew(self) -> None:
        """Take note that hosts may have other experts now."""
        self.avoid.clear()
        self.one_expert_per_send.clear()
        self._choose_anew(send for send in self.again if send.seq == NOT_SENT)

    def _choose_anew(self, sends: Iterable[Send]) -> None:
        """Let parts wait for any host: nothing of them was sent."""
        for send in list(sends):
            self.again.remove(send)
            self.wait_again(send.assignments)

    def update_late_at(self) -> None:
        """Set ``late_at`` to when the first send in flight is late."""
        due = (min(flight.expires, flight.hedge_at) for flight in self.in_flight.values())
        self.late_at = min(due, default=math.inf)

    def wait_again(self, assignments: np.ndarray) -> None:
        self.waiting_N = np.sort(np.concatenate([self.waiting_N, assignments]))

    def take(self, seq: int, answered: np.ndarray | None = None) -> bool:
        """Take a send without a useful answer out of flight; return whether any of it waits again.

        Its assignments wait again, except those in ``answered`` and those that one of its hedges
        carries. All arrays here are int64 of shape (n,), and hold assignment numbers.
        """
        flight = self.in_flight.pop(seq)
        if flight.rival is not None:
            # A hedge: the send that it repeats is still in flight and carries all its assignments.
            self.in_flight[flight.rival].hedges.discard(seq)
            return False
        # An original send: its hedges are disjoint and at first cover it. Each hedge in flight now
        # becomes an ordinary send, the only one with its assignments. The set difference leaves
        # what neither they nor the answer cover, such as parts whose hedge was taken before.
        carried = [] if answered is None else [answered]
        for hedge in flight.hedges:
            self.in_flight[hedge].rival = None
            carried.append(self.in_flight[hedge].send.assignments)
        left = flight.send.assignments
        if carried:
            left = np.setdiff1d(left, np.concatenate(carried), assume_unique=True)
        if left.size:
            self.wait_again(left)
        return left.size > 0

    def end(self, seq: int) -> list[Send]:
        """Take a send and its hedges out of flight; return the hedges, to be cancelled."""
        hedges = self.in_flight.pop(seq).hedges
        return [self.in_flight.pop(hedge).send for hedge in sorted(hedges)] if hedges else []

    def take_late(self, seq: int) -> Send | None:
        """Return a send that was given up and is answered now, or None if the answer is useless.

        It is useful while all its assignments still wait: an answer is accepted as a whole.
        """
        late = self.given_up.pop(seq, None)
        if late is None or not np.isin(late.assignments, self.waiting_N).all():
            return None
        self.waiting_N = np.setdiff1d(self.waiting_N, late.assignments, assume_unique=True)
        return late

    def note_unavailable(self, assignments: np.ndarray, now: float) -> None:
        """Take note which of the waiting assignments have no available replica now."""
        if not self.unavailable_N.size:
            self.unavailable_since = now
        self.unavailable_N = assignments

    def lose_patience(self, now: float) -> None:
        """Give up assignments that have no available replica and whose token waits no longer."""
        if not self.unavailable_N.size:
            return
        # A late answer may have served some of them since.
        self.unavailable_N = np.intersect1d(self.unavailable_N, self.waiting_N, assume_unique=True)
        if self.patience_T is not None and self.unavailable_N.size:
            over_n = self.unavailable_since + self._patience(self.unavailable_N) <= now
            self.out_of_patience.append(self.unavailable_N[over_n])
            self.waiting_N = np.setdiff1d(
                self.waiting_N, self.out_of_patience[-1], assume_unique=True
            )
            self.unavailable_N = self.unavailable_N[~over_n]

    def _patience(self, assignments: np.ndarray) -> np.ndarray:
        assert self.patience_T is not None
        return self.patience_T[assignments // self.top_k]

    def wake_at(self, now: float) -> float:
        """Return when the next deadline, hedge, end of patience or held-back retry is due."""
        due = [self.deadline, self.late_at]
        if self.unavailable_N.size and self.patience_T is not None:
            due.append(self.unavailable_since + float(self._patience(self.unavailable_N).min()))
        if (self.waiting_N.size or self.again) and self.hold_until > now:
            due.append(self.hold_until)
        return min(due)

    def expired(self, now: float) -> list[Send]:
        """Return the sends whose deadline has passed; the next ones get more time."""
        found = [flight.send for flight in self.in_flight.values() if now >= flight.expires]
        self.misses += bool(found)
        return found

    def take_again(self, hosts: Mapping[str, HostHealth]) -> list[Send]:
        """Return the sends that go to their own hosts again, as many as these have room for.

        Those of a process that is gone have failed.
        """
        ready: list[Send] = []
        for host in {send.host: None for send in self.again}:
            mine = [send for send in self.again if send.host == host]
            health = hosts.get(host)
            if health is None or health.entry.incarnation != mine[0].incarnation:
                self.lose_host(host)
            else:
                ready += mine[: max(0, health.room)]
        self.again = [send for send in self.again if send not in ready]
        return ready

    def stay(self, sends: Sequence[Send]) -> None:
        """Take sends without an answer out of flight; they go to their own hosts again."""
        for send in sends:
            del self.in_flight[send.seq]
        self.again += sends

    def lose_host(self, host: str) -> None:
        """Fail what only this host may compute: its process is gone."""
        sends = [f.send for f in self.in_flight.values() if f.send.host == host]
        for send in sends:
            del self.in_flight[send.seq]
        mine = [send for send in self.again if send.host == host]
        self._choose_anew(send for send in mine if send.seq == NOT_SENT)
        sends += [send for send in mine if send.seq != NOT_SENT]
        self.again = [send for send in self.again if send.host != host]
        why = "its connection ended before it had answered"
        self.failed += [(send, Refused(host, send.seq, "HostLost", why)) for send in sends]

    def stop(self) -> list[Send]:
        """Take everything out of flight and return the sends; their assignments wait again."""
        sends = [flight.send for flight in self.in_flight.values()]
        # A send and its hedges share assignments: `unique` counts each once.
        pending = [send.assignments for send in [*sends, *self.again]]
        self.waiting_N = np.unique(np.concatenate([self.waiting_N, *pending]))
        self.in_flight.clear()
        self.again.clear()
        return sends

    def not_here(self, send: Send) -> None:
        """Note that the host lacks an expert of ``send``.

        The refusal does not say which. If the send has several, the host gets one send for each
        expert from now on (`one_expert_per_send`).
        """
        experts = np.unique(self.ids_N[send.assignments])
        if experts.size == 1:
            self.avoid.add((send.host, int(experts[0])))
        else:
            self.one_expert_per_send.add(send.host)


class Sending(NamedTuple):
    """What the sends of a call that begin together have in common."""

    placement_id: PlacementId
    versions: LayerVersions
    attempt: int
    now: float
    expires: float

    def send(self, call: LayerCall, entry: HostEntry, rows: SendRows, seq: int) -> Send:
        versions = self.versions
        call.parts += 1
        return Send(
            call=call.number,
            placement_id=self.placement_id,
            host=entry.host,
            incarnation=entry.incarnation,
            seq=seq,
            timeout_s=self.expires - self.now,
            attempt=self.attempt,
            version=versions.most,
            other_versions=versions.others_of(rows.ids_tk) if versions.others else (),
            token_t=rows.token_t,
            assignment_tk=rows.assignment_tk,
            ids_tk=rows.ids_tk,
            assignments=rows.assignments,
            part=call.parts - 1,
        )

    def again(self, send: Send, seq: int) -> Send:
        """Return the same rows for the same process of a host, with the number of their part."""
        timeout_s = self.expires - self.now
        return replace(send, seq=seq, timeout_s=timeout_s, attempt=self.attempt)
