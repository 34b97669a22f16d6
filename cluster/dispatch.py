"""The router's state machine: events in, commands out.

One layer's call (dispatch, combine) is scattered over hosts, and every choice (a token and one of
its experts) is accepted from exactly one answer. A host that dies, freezes or refuses is replaced
by another replica inside the call; choices whose experts are nowhere to be had wait for a host or
a placement until the call's deadline, and are then reported as lost.

No clock, no sockets, no threads, no tensors: `actors/router.py` brings those.

Shape suffixes: T = tokens, K = choices of a token, N = T * K choices flattened, E = experts,
t and k = rows and columns of one send.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from .events import (
    Accept,
    Cancel,
    Command,
    Disconnect,
    Event,
    HostDown,
    HostUp,
    Ponged,
    Refresh,
    Refused,
    Replied,
    Send,
)
from .grouping import rank_within_expert
from .health import HostHealth, HostState, RouterPolicy
from .layer_call import LayerCall, Outcome
from .load import LoadMeter
from .placement import SHARE_STEPS, LayerKey, Placement

# Refusals after which another replica or a later moment may serve the same choices.
_RETRYABLE = ("NotHere", "Busy", "Expired", "HostLost")


class Dispatcher:
    """All hosts as one router sees them, and at most one layer's call in progress."""

    def __init__(self, policy: RouterPolicy) -> None:
        self.policy = policy
        self.placement: Placement | None = None
        self.hosts: dict[str, HostHealth] = {}
        self.outcome: Outcome | None = None
        self.retries = 0  # sends that another one had to replace
        self.ejections = 0
        self._call: LayerCall | None = None
        self._next_seq = 1
        self._rotations: dict[LayerKey, int] = defaultdict(int)
        self.meter = LoadMeter()
        # The layer that was asked for last, if no placement names it: its model may be asleep.
        self.unplaced: LayerKey | None = None

    # ---- placements -----------------------------------------------------------------------------

    def place(self, placement: Placement, now: float) -> list[Command]:
        """Take a newer placement; an older or equal one is ignored."""
        if self.placement is not None and placement.number <= self.placement.number:
            return []
        self.placement = placement
        commands: list[Command] = []
        for name, health in list(self.hosts.items()):
            entry = placement.hosts.get(name)
            if entry is None:
                health.state = HostState.LEAVING
            elif entry != health.entry:
                commands.append(Disconnect(name))
                self._orphan(name)
                del self.hosts[name]
        for name, entry in placement.hosts.items():
            known = self.hosts.get(name)
            if known is None:
                self.hosts[name] = HostHealth(entry, self.policy)
            elif known.state is HostState.LEAVING:
                known.state = HostState.UP
        if self._call is not None:
            self._call.avoid.clear()
            self._call.apart.clear()
            if self.outcome is None and self._call.key not in placement.layers:
                self.unplaced = self._call.key
        return commands + self.tick(now)

    # ---- one call -------------------------------------------------------------------------------

    def begin(
        self, key: LayerKey, ids_TK: np.ndarray, *, max_rows: int, now: float
    ) -> list[Command]:
        """Start a layer's call. Ids are int32; those outside of [0, experts) are unused choices."""
        assert self._call is None or self.outcome is not None, "one call at a time"
        ids_N = ids_TK.reshape(-1)
        self._rotations[key] += 1
        self._call = LayerCall(
            key=key,
            top_k=ids_TK.shape[1],
            max_rows=max_rows,
            deadline=now + self.policy.deadline_s,
            rotation=self._rotations[key],
            ids_N=ids_N,
            waiting_N=np.flatnonzero(ids_N >= 0),
        )
        self.outcome = None
        layer = self.placement.layers.get(key) if self.placement is not None else None
        self.unplaced = key if layer is None else None
        if layer is not None:
            self.meter.count(key, ids_N, len(layer.replicas))
        return self.tick(now)

    def abandon(self, now: float) -> list[Command]:
        """The caller was interrupted, nobody knows where: its call ends, and so do the connections
        on which something is under way."""
        call = self._call if self.outcome is None else None
        if call is None:
            return []
        self._end(call)
        busy = [name for name, health in self.hosts.items() if health.occupied]
        for name in busy:
            self.hosts[name].went_down(now)
        return [Disconnect(name) for name in busy]

    def handle(self, event: Event, now: float) -> list[Command]:
        commands: list[Command] = []
        health = self.hosts.get(event.host)
        if health is None:
            return commands
        match event:
            case HostUp(host, incarnation):
                if incarnation == health.entry.incarnation:
                    health.came_up()
                else:
                    commands.append(Disconnect(host))
                    health.went_down(now)
            case HostDown(host):
                health.went_down(now)
                self._orphan(host)
            case Ponged():
                health.came_up()
            case Replied(_, seq):
                health.occupied.discard(seq)
                health.came_up()
                commands += self._accept(seq)
            case Refused(_, seq, code, _):
                health.occupied.discard(seq)
                health.came_up()
                commands += self._refused(event, health, seq, code, now)
        return commands + self.tick(now)

    def tick(self, now: float) -> list[Command]:
        """Whatever is due at ``now``: deadlines, probes, connections, waiting choices."""
        commands: list[Command] = []
        call = self._call if self.outcome is None else None
        if call is not None:
            commands += self._expire(call, now)
        for name, health in list(self.hosts.items()):
            commands += health.tick(now)
            if health.state is HostState.LEAVING and not health.occupied:
                commands.append(Disconnect(name))
                del self.hosts[name]
        if call is not None and self.outcome is None:
            if call.waiting_N.size:
                commands += self._assign(call, now)
            if not call.waiting_N.size and not call.live:
                self.outcome = call.ended()
        return commands

    def wake_at(self, now: float) -> float:
        """The next moment at which `tick` has something to do, if no event comes before."""
        call = self._call if self.outcome is None else None
        waits = call is not None and call.waiting_N.size > 0
        due = [h.wake_at(now, work_waits=waits) for h in self.hosts.values()]
        if call is not None:
            due.append(call.deadline)
            due += [expires for _, expires in call.live.values()]
        return min(due, default=float("inf"))

    # ---- steps ----------------------------------------------------------------------------------

    def _wait_again(self, call: LayerCall, sends: list[Send]) -> None:
        if sends:
            back = [send.choices for send in sends]
            call.waiting_N = np.sort(np.concatenate([call.waiting_N, *back]))
            self.retries += len(sends)

    def _orphan(self, host: str) -> None:
        """What was sent to ``host`` will not be answered: its choices wait again."""
        call = self._call if self.outcome is None else None
        if call is not None:
            lost = [seq for seq, (send, _) in call.live.items() if send.host == host]
            self._wait_again(call, [call.live.pop(seq)[0] for seq in lost])
            for seq in [s for s, send in call.given_up.items() if send.host == host]:
                del call.given_up[seq]

    def _accept(self, seq: int) -> list[Command]:
        call = self._call if self.outcome is None else None
        if call is None:
            return []
        if seq in call.live:
            return [Accept(call.live.pop(seq)[0])]
        late = call.given_up.pop(seq, None)
        if late is not None and np.isin(late.choices, call.waiting_N).all():
            call.waiting_N = np.setdiff1d(call.waiting_N, late.choices, assume_unique=True)
            return [Accept(late)]
        return []

    def _refused(
        self, event: Refused, health: HostHealth, seq: int, code: str, now: float
    ) -> list[Command]:
        call = self._call if self.outcome is None else None
        if call is None or seq not in call.live:
            return []
        send, _ = call.live.pop(seq)
        if code not in _RETRYABLE:
            call.failed.append((send, event))
            return []
        self._wait_again(call, [send])
        if code == "Busy":
            health.busy_until = now + self.policy.busy_s
        if code == "NotHere":
            experts = np.unique(call.ids_N[send.choices])
            if experts.size == 1:
                call.avoid.add((send.host, int(experts[0])))
            else:
                call.apart.add(send.host)
            return [Refresh()]
        return []

    def _end(self, call: LayerCall) -> list[Command]:
        """Whatever has no answer yet gets none."""
        cancels: list[Command] = [Cancel(send.host, seq) for seq, (send, _) in call.live.items()]
        pending = [send.choices for send, _ in call.live.values()]
        call.waiting_N = np.sort(np.concatenate([call.waiting_N, *pending]))
        call.live.clear()
        self.outcome = call.ended()
        return cancels

    def _expire(self, call: LayerCall, now: float) -> list[Command]:
        if now >= call.deadline:
            return self._end(call)
        late = {send.host for send, expires in call.live.values() if now >= expires}
        commands: list[Command] = []
        for host in sorted(late):
            # The whole host is suspect, so that its other calls need not miss a deadline each.
            self.hosts[host].eject(now)
            self.ejections += 1
            seqs = [seq for seq, (send, _) in call.live.items() if send.host == host]
            sends = [call.live.pop(seq)[0] for seq in seqs]
            call.given_up.update(zip(seqs, sends, strict=True))
            self._wait_again(call, sends)
            commands += [Cancel(host, seq) for seq in seqs]
        if late:
            call.misses += 1
        return commands

    def _assign(self, call: LayerCall, now: float) -> list[Command]:
        """Send the waiting choices that some host can take; the others go on waiting."""
        placement = self.placement
        if placement is None or call.key not in placement.layers:
            return []
        # transformers marks choices that belong to nobody with the number of experts.
        inside = call.ids_N[call.waiting_N] < len(placement.layers[call.key].replicas)
        call.waiting_N = call.waiting_N[inside]
        if not placement.host_order:
            return []  # every host is gone
        healths = [self.hosts.get(name) for name in placement.host_order]
        usable = np.array([h is not None and h.takes_calls(now) for h in healths], dtype=bool)
        host_n = self._choose(call, placement, usable)
        still = [call.waiting_N[host_n < 0]]
        commands: list[Command] = []
        for index, health in enumerate(healths):
            mine = call.waiting_N[host_n == index]
            if health is None or not mine.size:
                continue
            for token_t, choice_tk in call.pieces(health.entry.host, mine):
                if health.room <= 0:
                    still.append(choice_tk[choice_tk >= 0])
                    continue
                commands.append(self._send(call, health, token_t, choice_tk, now))
        call.waiting_N = np.sort(np.concatenate(still))
        return commands

    def _choose(self, call: LayerCall, placement: Placement, usable: np.ndarray) -> np.ndarray:
        """For each waiting choice the index of a host that may take it, or -1."""
        table = placement.tables[call.key]
        ids_n = call.ids_N[call.waiting_N]
        step_n = np.full(ids_n.size, call.rotation)
        if ids_n.size > self.policy.split_rows:
            step_n += rank_within_expert(ids_n) // self.policy.split_rows
        host_n = table[ids_n, step_n % SHARE_STEPS].astype(np.int64)
        open_EH = placement.holders[call.key] & usable
        for host, expert in call.avoid:
            if host in placement.host_index:
                open_EH[expert, placement.host_index[host]] = False
        unserved = np.flatnonzero((host_n < 0) | ~open_EH[ids_n, host_n])
        for expert in np.unique(ids_n[unserved]):
            mine = unserved[ids_n[unserved] == expert]
            others = np.flatnonzero(open_EH[expert])
            host_n[mine] = others[step_n[mine] % others.size] if others.size else -1
        return host_n

    def _send(
        self,
        call: LayerCall,
        health: HostHealth,
        token_t: np.ndarray,
        choice_tk: np.ndarray,
        now: float,
    ) -> Send:
        expires = min(now + self.policy.attempt_s * 2**call.misses, call.deadline)
        send = Send(
            host=health.entry.host,
            incarnation=health.entry.incarnation,
            seq=self._next_seq,
            timeout_s=expires - now,
            token_t=token_t,
            choice_tk=choice_tk,
            ids_tk=np.where(choice_tk >= 0, call.ids_N[choice_tk], -1).astype(np.int32),
        )
        self._next_seq += 1
        health.occupied.add(send.seq)
        call.live[send.seq] = (send, expires)
        return send
