"""The host's state machine: which experts it holds, which calls wait, and what it computes next.

A call is admitted or refused before anything is computed. Whenever the device is free, `next_batch`
takes queued calls for one layer, from all routers, as one computation; it does not wait for more
calls to arrive. Start-time fair queueing over routers decides which layer comes next (Goyal et al.,
SIGCOMM 1996), so that one router's large prefill delays another's decode step by at most one batch.

The clock is an argument. Sockets and tensors are in `actors/host/host.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from ...proto.errors import Busy, CallError, Expired, MoesaicError, NotHere
from ..expert_keys import ExpertKey, ExpertVersion, LayerKey
from .emulation import Emulation


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPolicy:
    """Limits of one host, in rows (tokens of calls), and the device that it emulates, if any."""

    max_rows: int = 512  # of one call
    max_batch_rows: int = 1024  # of one computation
    max_queue_rows: int = 16_384  # more are refused as Busy; retries and hedges beyond half of it
    emulate: Emulation | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLimits:
    """A host's limits as a spec states them; None: what suits the host's device."""

    max_rows: int | None = None
    max_batch_rows: int | None = None
    max_queue_rows: int | None = None
    emulate: Emulation | None = None

    def policy(self, *, gpu: bool) -> HostPolicy:
        """Return the limits on a GPU or on a CPU; those that are stated limit the others, too.

        A CPU takes as long for the parts of a call as for the whole of it, and another router waits
        for one part only. A GPU computes the whole several times faster.
        """
        usual = (
            HostPolicy(max_rows=16_384, max_batch_rows=16_384, max_queue_rows=131_072)
            if gpu
            else HostPolicy()
        )
        stated = [one for one in (self.max_batch_rows, self.max_queue_rows) if one is not None]
        rows = self.max_rows or min([usual.max_rows, *stated])
        batch = self.max_batch_rows or max(
            rows, min(usual.max_batch_rows, self.max_queue_rows or usual.max_batch_rows)
        )
        queue = self.max_queue_rows or max(batch, usual.max_queue_rows)
        return HostPolicy(
            max_rows=rows, max_batch_rows=batch, max_queue_rows=queue, emulate=self.emulate
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """The shape and dtype that all calls of one layer must have."""

    num_experts: int
    hidden_size: int
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QueuedCall:
    """The data of a call that the host's decisions depend on; the shell keeps its tensors."""

    router: str
    seq: int
    key: LayerKey
    rows: int
    hidden: int
    dtype: str
    exact: bool
    expires_at: float
    incarnation: int
    version: int  # of its experts' weights
    other_versions: tuple[tuple[int, int], ...] = ()  # (expert, version) where it is another one
    attempt: int = 0  # failed sends before it in its router's layer call
    backward: bool = False  # it asks for gradients
    keeps: bool = False  # activations are kept for its backward half
    ids: np.ndarray  # int32 expert ids, -1 as padding

    @property
    def cost_rows(self) -> int:
        """The rows of forward calls that take as long: gradients take two more products each."""
        return 3 * self.rows if self.backward else self.rows


def split_batch_time(batch_us: int, batch: Sequence[QueuedCall]) -> list[int]:
    """Split the time of a computation over its calls by their assignments; the sum is exact."""
    # Cumulative sums are rounded rather than the parts, so that the parts add up to the whole. The
    # 1 keeps the divisor positive when all calls are padding. Shape (calls,).
    done_C = np.cumsum([1 + int((call.ids >= 0).sum()) for call in batch])
    ends = [batch_us * int(done) // int(done_C[-1]) for done in done_C]
    return [end - start for start, end in pairwise([0, *ends])]


@dataclass(slots=True)
class _Layer:
    shape: LayerShape
    # {version: bool (experts + 1,)}: which experts are held. Index -1 is padding, whose entry is
    # True.
    held: dict[int, np.ndarray] = field(default_factory=dict)

    def holds(self, expert: int, version: int) -> bool:
        held_E = self.held.get(version)
        return held_E is not None and 0 <= expert < len(held_E) - 1 and bool(held_E[expert])

    def versions_of(self, expert: int) -> list[int]:
        return sorted(version for version, held_E in list(self.held.items()) if held_E[expert])


class Residency:
    """The experts of one host and its bounded queue."""

    def __init__(self, policy: HostPolicy, *, incarnation: int) -> None:
        self.policy = policy
        self.incarnation = incarnation
        self.queued_rows = 0
        self._layers: dict[LayerKey, _Layer] = {}
        self._queue: list[QueuedCall] = []
        # Fair queueing: the virtual time of each router and of the last batch, in rows. A router's
        # advances by the rows that it gets computed; the call with the smallest one is next.
        self._virtual: dict[str, float] = {}
        self._now_virtual = 0.0

    # ---- experts --------------------------------------------------------------------------------

    def hold(self, weights: ExpertVersion, shape: LayerShape) -> None:
        """Admit calls for this version of this expert from now on: the weights are ready."""
        key = weights.key
        layer = self._layers.setdefault(LayerKey(key.model, key.layer), _Layer(shape))
        held_E = layer.held.get(weights.version)
        if held_E is None:
            held_E = np.zeros(shape.num_experts + 1, dtype=bool)
            held_E[-1] = True
        held_E[key.expert] = True
        layer.held[weights.version] = held_E  # other threads read it: only now, when it is whole

    def release(self, gone: Iterable[ExpertVersion]) -> list[tuple[QueuedCall, MoesaicError]]:
        """Release experts; return the queued calls that need one of them, with their refusals."""
        for (model, number, expert), version in gone:
            key = LayerKey(model, number)
            layer = self._layers.get(key)
            if layer is None or not layer.holds(expert, version):
                continue
            layer.held[version][expert] = False
            if not layer.held[version][:-1].any():
                del layer.held[version]
            if not layer.held:
                del self._layers[key]
        refused = [(call, e) for call in self._queue if (e := self._not_here(call)) is not None]
        self._remove(call for call, _ in refused)
        return refused

    def serves(self, weights: ExpertVersion) -> bool:
        """Return whether this version of this expert is held; may be called from any thread."""
        key = weights.key
        layer = self._layers.get(LayerKey(key.model, key.layer))
        return layer is not None and layer.holds(key.expert, weights.version)

    def versions(self, key: ExpertKey) -> list[int]:
        """Return the versions of an expert that are held; may be called from any thread."""
        layer = self._layers.get(LayerKey(key.model, key.layer))
        return [] if layer is None else layer.versions_of(key.expert)

    def serves_layer(self, key: LayerKey) -> bool:
        """Return whether any expert of the layer is held; may be called from any thread."""
        return key in self._layers

    def holdings(self) -> dict[LayerKey, dict[int, tuple[int, ...]]]:
        """Return what is held: for each layer, its experts with the versions of each."""
        found: dict[LayerKey, dict[int, tuple[int, ...]]] = {}
        for key, layer in sorted(self._layers.items()):
            experts: dict[int, tuple[int, ...]] = {}
            for version, held_E in sorted(layer.held.items()):
                for expert in np.flatnonzero(held_E[:-1]).tolist():
                    experts[expert] = (*experts.get(expert, ()), version)
            found[key] = dict(sorted(experts.items()))
        return found

    # ---- calls ----------------------------------------------------------------------------------

    def admit(self, call: QueuedCall, now: float) -> MoesaicError | None:
        """Queue a call and return None, or return the reason for refusing it."""
        error = self._not_here(call) or self.misfit(
            call.key, rows=call.rows, hidden=call.hidden, dtype=call.dtype
        )
        if error is not None:
            return error
        if now >= call.expires_at:
            return Expired(f"call {call.seq}: its deadline passed before it arrived")
        most = self.policy.max_queue_rows
        if self.queued_rows + call.rows > most or (call.attempt and self.queued_rows > most // 2):
            return Busy(
                f"queue: {self.queued_rows} of {most} rows wait, no room for {call.rows} more; "
                "send again later or to another replica"
            )
        self._queue.append(call)
        self.queued_rows += call.rows
        self._virtual.setdefault(call.router, self._now_virtual)
        return None

    def cancel(self, router: str, seq: int) -> None:
        """Remove a queued call; one that is already being computed is answered all the same."""
        self._remove([c for c in self._queue if c.router == router and c.seq == seq])

    def router_gone(self, router: str) -> None:
        self._remove([c for c in self._queue if c.router == router])
        self._virtual.pop(router, None)

    def next_batch(
        self, now: float
    ) -> tuple[list[QueuedCall], list[tuple[QueuedCall, MoesaicError]]]:
        """Return (calls to compute together, expired calls to refuse); both empty when idle."""
        expired = [
            (c, Expired(f"call {c.seq}: waited beyond its deadline and was not computed"))
            for c in self._queue
            if now >= c.expires_at
        ]
        self._remove(call for call, _ in expired)
        if not self._queue:
            return [], list(expired)
        lead = min(self._queue, key=self._start_time)
        batch, rows, kind = [lead], lead.rows, _kind(lead)
        for call in self._queue:
            fits = rows + call.rows <= self.policy.max_batch_rows
            alike = _kind(call) == kind
            if call is not lead and alike and fits:
                batch.append(call)
                rows += call.rows
        self._now_virtual = self._start_time(lead)
        for call in batch:
            self._virtual[call.router] = self._start_time(call) + call.cost_rows
        self._remove(batch)
        return batch, list(expired)

    # ---- steps ----------------------------------------------------------------------------------

    def _start_time(self, call: QueuedCall) -> float:
        # An idle router starts at the current virtual time, so that it cannot save up credit.
        return max(self._virtual[call.router], self._now_virtual)

    def _remove(self, calls: Iterable[QueuedCall]) -> None:
        gone = {id(call) for call in calls}
        if gone:
            self._queue = [call for call in self._queue if id(call) not in gone]
            self.queued_rows = sum(call.rows for call in self._queue)

    def _not_here(self, call: QueuedCall) -> MoesaicError | None:
        if call.incarnation != self.incarnation:
            return NotHere(
                f"incarnation: the call is for {call.incarnation}, this host is {self.incarnation}"
            )
        layer = self._layers.get(call.key)
        if layer is None:
            return NotHere(
                f"this host has no expert of layer {call.key.layer} of {call.key.model!r}"
            )
        highest, lowest = int(call.ids.max(initial=-1)), int(call.ids.min(initial=0))
        if highest >= layer.shape.num_experts or lowest < -1:
            beyond = highest if highest >= layer.shape.num_experts else lowest
            return CallError(
                f"ids: expert {beyond} does not exist; layer {call.key.layer} of "
                f"{call.key.model!r} has {layer.shape.num_experts} experts"
            )
        held_E = layer.held.get(call.version)
        here = call.ids < 0 if held_E is None else held_E[call.ids]
        for expert, version in call.other_versions:
            mine = call.ids == expert
            if mine.any() and not layer.holds(expert, version):
                return _lacks(call, expert, version, layer)
            here = here | mine
        return None if here.all() else _lacks(call, int(call.ids[~here][0]), call.version, layer)

    def misfit(self, key: LayerKey, *, rows: int, hidden: int, dtype: str) -> CallError | None:
        """Return why a call is too large or does not fit the model, or None.

        This is checked before the call's tensors arrive. For a layer that is not held only the
        number of rows is checked. May be called from any thread.
        """
        layer = self._layers.get(key)
        if layer is not None and hidden != layer.shape.hidden_size:
            return CallError(f"hidden: {hidden}, but {key.model!r} has {layer.shape.hidden_size}")
        if layer is not None and dtype != layer.shape.dtype:
            return CallError(f"dtype: {dtype}, but {key.model!r} is held as {layer.shape.dtype}")
        if rows > self.policy.max_rows:
            return CallError(
                f"rows: {rows} exceed this host's {self.policy.max_rows} per call; split the call"
            )
        return None


def _kind(call: QueuedCall) -> object:
    """Return what calls must have in common to be computed together."""
    if call.backward or call.keeps:
        # An expert's gradients are added up call by call, so that their bits are always the same.
        # The activations of a call serve its own backward half.
        return call.router, call.seq
    # Versions of different experts could be merged as well, but such calls are rare.
    return call.key, call.exact, call.dtype, call.version, call.other_versions


def _lacks(call: QueuedCall, expert: int, version: int, layer: _Layer) -> NotHere:
    weights, there = ExpertVersion(call.key.expert(expert), version), layer.versions_of(expert)
    others = f"; it has version {', '.join(map(str, there))}" if there else ""
    return NotHere(f"{weights} is not on this host{others}")
