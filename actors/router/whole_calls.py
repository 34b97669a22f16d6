"""Calls that a router computes as a whole, because hosts have lent all of their experts.

Each step here counts: the model's weights have swept the caches since the last call, so that code
takes three to five times as long as usual. The lock is taken only where something is chosen, and
where something has changed.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto

import torch
from torch import Tensor

from ...cluster.expert_keys import LayerKey
from ...cluster.placement import Placement
from ...cluster.routing.dispatch import Dispatcher
from ...kernels.ffn import all_finite
from ...kernels.grouped.slots import StepFlags
from .lent_experts import LentExperts
from .lent_part import LayerReach
from .router_stats import CallCounts

COUNT_AT = 64  # calls that were noted

# (what is within reach, x_TH, ids_TK, weights_TK) -> the sums in x's dtype, or None if these cannot
# be used.
Computation = Callable[[LayerReach, Tensor, Tensor, Tensor], Tensor | None]


class PassCheck(Enum):
    """How it is found out that a call of a forward pass cannot be used, if all is computed here.

    A pass is run again if that is found at its end.
    """

    CALLS = auto()  # each call by itself
    DEVICE = auto()  # calls on a device at the end, which waits for it once; others by themselves
    # All at the end. The pass's result is checked, too: whatever was not finite made it so.
    RESULT = auto()


class _Step:
    """The calls of a forward pass, which are checked together when it ends."""

    def __init__(self, *, on_cpu: bool) -> None:
        self.on_cpu = on_cpu  # calls on a CPU are checked so, too
        self._flags: StepFlags | None = None
        self._reaches: set[LayerReach] = set()
        self._in_use = ExitStack()

    @property
    def flags(self) -> StepFlags | None:
        """What calls on a device set, if there were any."""
        return self._flags

    def use_device(self, flags: StepFlags, in_use: AbstractContextManager[None]) -> None:
        """Let calls on a device set these flags.

        Until the step ends nothing is unmapped, since the device may be computing with it.
        """
        self._in_use.enter_context(in_use)
        self._flags = flags
        flags.clear()

    def note(self, reach: LayerReach) -> None:
        """Take note that a call computes with these experts."""
        self._reaches.add(reach)

    def is_sound(self, result: Tensor | None) -> bool:
        if self._flags is not None:
            missing, infinite = self._flags.read()
            if infinite and result is not None:
                # The result lacks rows that pad a batch, and these may hold anything.
                infinite = not all_finite(result)
            sound = not missing and not infinite
        else:
            sound = not self._reaches or (result is not None and all_finite(result))
        return sound and all(reach.unchanged() for reach in self._reaches)

    def close(self) -> None:
        self._in_use.close()


@dataclass(slots=True)
class _Thread:
    """The steps that a thread has begun, one inside the other."""

    steps: list[_Step | None] = field(default_factory=list)
    paused: int = 0


class WholeCalls:
    """Computes such calls; any thread may, without the router's lock."""

    def __init__(
        self,
        lent: LentExperts,
        dispatcher: Dispatcher,
        counts: CallCounts,
        lock: threading.RLock,
        clock: Callable[[], float],
        stirred: threading.Event,
    ) -> None:
        """Take a router's parts; ``stirred`` is set when there is something to report."""
        self._lent = lent
        self._dispatcher = dispatcher
        self._counts = counts
        self._lock = lock
        self._clock = clock
        self._stirred = stirred
        self._threads = threading.local()
        # Layers whose calls are in captured graphs, and what those set.
        self._captured: set[LayerKey] = set()
        self._captured_flags: StepFlags | None = None

    def compute(
        self,
        key: LayerKey,
        placement: Placement | None,
        x_TH: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        began: float,
        computation: Computation | None = None,
    ) -> Tensor | None:
        """Return the call's result, (T, H) in x's dtype, or None if it is not such a call.

        ``computation`` computes it in another way, on a CPU, and checks it by itself.
        """
        lent = self._lent
        reach = lent.known_reach(key, placement)
        if reach is None:
            with self._lock:
                reach = lent.reach(key, placement)
        if reach is None:
            return None
        if reach.is_on_device:
            if computation is not None:
                return None
            return self._on_device(key, reach, x_TH, ids_TK, weights_TK)
        place_TK = reach.places(x_TH, ids_TK, weights_TK)
        if place_TK is None:
            return None
        mine = self._mine()
        step = mine.steps[-1] if mine.steps and not mine.paused else None
        if step is not None and not step.on_cpu:
            step = None
        choice = None
        if lent.splits:
            with self._lock:
                all_here, choice = lent.keep_all(reach, place_TK.size, self._dispatcher, began)
            if not all_here:
                return None
        out_TH = None
        try:
            if computation is not None:
                out_TH = computation(reach, x_TH, ids_TK, weights_TK)
            else:
                if step is not None:
                    step.note(reach)
                out_TH = reach.compute_all(x_TH, ids_TK, weights_TK, place_TK, check=step is None)
        finally:
            if out_TH is None or choice is not None:
                took_s = None if out_TH is None else self._clock() - began
                with self._lock:
                    lent.took_all(key, choice, took_s)
        if out_TH is not None:
            if (noted := self._counts.note(key, reach, place_TK)) == 1:
                self._stirred.set()
            if noted >= COUNT_AT:
                with self._lock:
                    self._counts.count_noted()
        return out_TH

    # ---- training -------------------------------------------------------------------------------

    def reach(self, key: LayerKey) -> LayerReach | None:
        """Return what of a layer is within reach under the placement in use; None if nothing is."""
        with self._lock:
            return self._lent.reach(key, self._dispatcher.placement)

    def learned(self, reach: LayerReach, began: float) -> None:
        """Count the time since ``began`` as that of a training call with what hosts have lent."""
        with self._lock:
            hosts = [host for host in reach.hosts if host]
            self._dispatcher.meter.lent(hosts, self._clock() - began)
        self._stirred.set()

    def now(self) -> float:
        return self._clock()

    def elements(self, model: str) -> int:
        """Return how many numbers all experts of a model have; 0 if nothing of it is lent."""
        with self._lock:
            return self._lent.elements(model)

    # ---- forward passes -------------------------------------------------------------------------

    def begin_step(self, check: PassCheck) -> None:
        """Begin a forward pass of this thread, whose calls are checked as ``check`` says."""
        on_cpu = check is PassCheck.RESULT
        step = None if check is PassCheck.CALLS else _Step(on_cpu=on_cpu)
        self._mine().steps.append(step)
        if step is not None and self._captured:
            self._join_captured(step)

    def step_is_sound(self, result: Tensor | None) -> bool:
        """Wait for the calls of this thread's pass, and return whether they may be used."""
        step = self._mine().steps[-1]
        return step is None or step.is_sound(result)

    def end_step(self) -> None:
        step = self._mine().steps.pop()
        if step is not None:
            step.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Compute no whole call of this thread that would be checked later."""
        mine = self._mine()
        mine.paused += 1
        try:
            yield
        finally:
            mine.paused -= 1

    def _mine(self) -> _Thread:
        if not hasattr(self._threads, "own"):
            self._threads.own = _Thread()
        return self._threads.own

    def _join_captured(self, step: _Step) -> None:
        """Let a pass check the calls of captured graphs, which run no code of the router."""
        assert self._captured_flags is not None
        step.use_device(self._captured_flags, self._lent.in_use())
        with self._lock:
            for key in self._captured:
                # If experts have moved, the table that the graph reads says so from now on.
                reach = self._lent.refresh(key, self._dispatcher.placement)
                if reach is not None:
                    step.note(reach)

    # ---- on a device ----------------------------------------------------------------------------

    def _on_device(
        self, key: LayerKey, reach: LayerReach, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> Tensor | None:
        mine = self._mine()
        if mine.paused or not reach.takes_all(x_TH, ids_TK, weights_TK):
            return None
        step, flags = mine.steps[-1] if mine.steps else None, None
        if step is not None:
            if step.flags is None:
                step.use_device(StepFlags.on(x_TH.device), self._lent.in_use())
            step.note(reach)
            flags = step.flags
        elif is_capturing(x_TH.device):
            # Nothing may wait now; the passes that run the graph check it.
            self._captured.add(key)
            flags = self._captured_flags
        elif self._captured_flags is None:
            # Memory that is allocated during a capture belongs to the graph, so allocate it before.
            self._captured_flags = StepFlags.on(x_TH.device)
        out_TH = reach.compute_on_device(x_TH, ids_TK, weights_TK, flags)
        if out_TH is None:
            with self._lock:
                self._lent.changed(key)
            return None
        self._counts.note_on_device(key, ids_TK, reach.count)
        if not self._stirred.is_set():
            self._stirred.set()
        return out_TH


def is_capturing(device: torch.device) -> bool:
    """Return whether what is enqueued now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
