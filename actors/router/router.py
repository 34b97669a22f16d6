"""The router: the library in every trunk process that computes experts' layers in the pool.

It is a thin shell around `cluster/routing/dispatch.py`. Any number of calls may be in progress, in
one thread or several: `dispatch` sends a call and returns, `PoolCall.combine` waits for its result.
The calling thread itself sends and adds the answers up. Of the threads that wait, one waits for all
hosts at once, handles what arrives for any call, and wakes the others. Between calls, `Upkeep`
looks after the connections while somebody waits for an expert.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ...cluster.expert_keys import ExpertKey, LayerKey
from ...cluster.load.meter import LoadReport
from ...cluster.placement import Placement, PlacementId
from ...cluster.routing.dispatch import Dispatcher
from ...cluster.routing.events import RouterCommand
from ...cluster.routing.expert_fallback import BatchExpertOptions
from ...cluster.routing.layer_call import LayerCall, Outcome
from ...cluster.routing.policy import RouterPolicy
from ...cluster.routing.transports import TransportChoice
from ...kernels.ffn import ExpertForm
from ...models.trunk.in_pool import PoolFunction
from ...proto.errors import ClusterError
from ...proto.keys import ClusterSecret, secret_of_process
from ..transport.poller import Poller
from .call_log import CallLog
from .command_shell import CommandShell, Waiting
from .connect import Connect, connect
from .connections import HostConnections
from .layer_tensors import LayerTensors, check_tensors
from .lent_experts import Allocate, LentExperts
from .lent_part import LentPart, patience
from .pool_call import PoolCall, RunningCall
from .router_stats import CallCounts, RouterStats
from .row_attribution import RowAttribution
from .upkeep import Upkeep
from .whole_calls import Computation, PassCheck, WholeCalls

_CPU = torch.device("cpu")


class Router:
    """Computes experts' layers on the hosts of a placement; thread-safe."""

    def __init__(
        self,
        *,
        name: str,
        node: str,
        policy: RouterPolicy | None = None,
        transport: TransportChoice = "auto",
        device: torch.device = _CPU,
        refresh: Callable[[], None] | None = None,
        secret: ClusterSecret | None = None,
        clock: Callable[[], float] = time.monotonic,
        forms: Mapping[LayerKey, ExpertForm] | None = None,
        connect: Connect = connect,
        poller: Poller | None = None,
        numa: int | None = None,
        allocate: Allocate | None = None,
    ) -> None:
        """Create a router that waits for its first placement.

        ``node`` is this process's Ray node and ``device`` is where its tensors are; both decide
        which transport reaches a host. ``refresh`` is called when a host lacks an expert that the
        placement promises; it must not block. ``secret`` is the secret of the hosts' cluster (None:
        that of this process). ``forms`` has the arithmetic of layers that the router computes
        itself where hosts of this machine lend it their experts, also of layers that are added
        later (None: it computes none). ``connect`` opens its connections, and ``poller`` waits for
        all of them (None: the system's). ``numa`` is the NUMA node that this process is pinned to,
        if it is to one. ``allocate`` returns addresses on ``device`` (None: of a CUDA device).
        """
        self.name, self._clock = name, clock
        self.policy = policy or RouterPolicy()
        self._upkeep = Upkeep(name, self._look_after)
        self.expecting = self._upkeep.expecting
        self.batch = RowAttribution(name, self.has, self.expecting)
        self.step = 0  # forward passes that have begun
        self.exact_models: set[str] = set()  # besides those of the placement
        self._log = CallLog(name)
        self._dispatcher = Dispatcher(self.policy)
        self._lent_experts = LentExperts(
            {} if forms is None else forms, self.policy, device, allocate
        )
        self._connections = HostConnections(
            router=name,
            node=node,
            transport=transport,
            slots=self.policy.window,
            device=device,
            secret=secret or secret_of_process(),
            clock=clock,
            borrower=None if forms is None else self._lent_experts,
            connect=connect,
            poller=poller,
            numa=numa,
        )
        self._shell = CommandShell(
            name,
            self._dispatcher,
            self._connections,
            clock=clock,
            refresh=refresh,
            interrupted=lambda: self._waiting.wake_others(),
        )
        self._counts = CallCounts(self._dispatcher.meter)
        # Never held while a thread waits for events.
        self._lock = threading.RLock()
        # There is something to report: set when calls begin and layers are asked for.
        self.stirred = threading.Event()
        self.whole_calls = WholeCalls(
            self._lent_experts, self._dispatcher, self._counts, self._lock, clock, self.stirred
        )
        self._waiting = Waiting(self._shell, self._connections, self._lock, clock)

    # ---- life -----------------------------------------------------------------------------------

    def place(self, placement: Placement) -> None:
        """Use ``placement`` from the next send on. Any thread may call this; it hardly blocks."""
        with self._lock:
            if self._shell.closed:
                return
            self._shell.execute(self._dispatcher.place(placement, self._clock()))
            self._lent_experts.follow(placement, self._clock())
            self._waiting.wake_others()

    def wait_ready(self, timeout_s: float, layers: Sequence[LayerKey] = ()) -> None:
        """Wait until ``layers`` are placed and every host accepts calls. Raises ClusterError."""
        deadline = self._clock() + timeout_s
        found = self._dispatcher.registry
        while True:
            with self._lock:
                self._check_open()
                if found.all_up and not found.unplaced(layers):
                    return
                self._ask_for(layers)
                self._waiting.until(min(deadline, self._clock() + 0.05))
            if self._clock() >= deadline:
                states = (f"{h} {s.state.value}" for h, s in found.hosts.items())
                unplaced = f"{len(found.unplaced(layers))} of {len(layers)} layers"
                raise ClusterError(
                    f"router {self.name} was not ready within {timeout_s:g} s: {unplaced} have no "
                    f"placement; its hosts are {', '.join(states) or 'unknown'}"
                )

    def wait_placed(self, number: PlacementId, timeout_s: float) -> None:
        """Wait until calls follow a placement, or a newer one. Raises ClusterError."""
        deadline = self._clock() + timeout_s
        while True:
            with self._lock:
                self._check_open()
                placement = self._dispatcher.placement
                if placement is not None and placement.id >= number:
                    return
                self._waiting.until(min(deadline, self._clock() + 0.05))
            if self._clock() >= deadline:
                raise ClusterError(
                    f"router {self.name} has not received placement {tuple(number)} within "
                    f"{timeout_s:g} s; see `moesaic status`"
                )

    def has(self, experts: Sequence[ExpertKey]) -> bool:
        """Return whether each of these experts can be computed now, by some host or here.

        It neither waits nor connects: calls do so, and between them the router's own thread, while
        somebody is inside `expecting` (see `Upkeep`).
        """
        # Without the lock: placements are replaced as a whole, and each other read is of one value.
        now, found, lent = self._clock(), self._dispatcher, self._lent_experts
        return all(found.registry.has(e, now) or lent.has(e, found.placement) for e in experts)

    def _look_after(self, layers: Sequence[LayerKey]) -> None:
        """Handle what arrived and what is due, and ask for ``layers`` that are not placed."""
        with self._lock:
            if not self._shell.closed:
                self._waiting.until(self._clock())
                self._ask_for(layers)

    @property
    def placement(self) -> Placement | None:
        """The placement that calls follow."""
        return self._dispatcher.placement

    def stats(self) -> RouterStats:
        with self._lock:
            self._counts.count_noted()
        lost, transports = self.batch.lost, self._connections.transports
        return RouterStats.of(self._dispatcher, self._counts, rows_lost=lost, transports=transports)

    def take_load(self) -> LoadReport:
        """Return the load counted since the last report, and the number of the placement in use."""
        with self._lock:
            self._lent_experts.let_go(self._clock())
            found = self._dispatcher
            asked = () if found.unplaced is None else (found.unplaced,)
            found.asked_for = None
            paths = self._connections.paths(self._lent_experts.lenders)
            counts = self._counts.take(found, self.batch.lost, self._connections.meter.take())
            return found.meter.take(self.name, found.followed, found.received, asked, paths, counts)

    def _ask_for(self, layers: Sequence[LayerKey]) -> None:
        """Let the next report name a layer that no placement has, if one of these is."""
        self._dispatcher.asked_for = next(iter(self._dispatcher.registry.unplaced(layers)), None)
        if self._dispatcher.asked_for is not None:
            self.stirred.set()

    def close(self) -> None:
        """Close all connections; calls in progress end with ClusterError."""
        self._upkeep.close()
        with self._lock:
            if self._shell.closed:
                return
            self._shell.closed = True
            self._waiting.stop()
            self._connections.close()
            self._lent_experts.clear()
            self._waiting.wake_others()

    # ---- computing ------------------------------------------------------------------------------

    def experts(self, model: str, layer: int) -> PoolFunction:
        """Return the function that computes one layer of one model in the pool."""
        key = LayerKey(model, layer)
        return lambda x_TH, ids_TK, weights_TK: self.forward(key, x_TH, ids_TK, weights_TK)

    def begin_step(self, check: PassCheck = PassCheck.CALLS) -> None:
        """Start a forward pass: forget the rows that were lost in the last one.

        Its calls use the versions of weights that are served now, until `end_step`, which the same
        thread calls. If ``check`` leaves anything to the end, who runs the pass asks
        `step_is_sound` then, and if need be runs it again in `repeating`.
        """
        self.whole_calls.begin_step(check)
        self.step += 1
        self.batch.begin_step(self.step)
        with self._lock:
            if not self._shell.closed:
                self._shell.execute(self._dispatcher.begin_step(self._clock()))

    def step_is_sound(self, result: Tensor | None = None) -> bool:
        """Wait for a pass, and return whether its ``result``, (..., H), may be used."""
        return self.whole_calls.step_is_sound(result)

    def repeating(self) -> AbstractContextManager[None]:
        """Return a context in which a pass is run once more, and each call is checked alone."""
        return self.whole_calls.paused()

    def end_step(self) -> None:
        """End a forward pass: the next one may use other versions of weights."""
        self.whole_calls.end_step()
        with self._lock:
            if not self._shell.closed:
                self._follow_newest(self._dispatcher.end_step(self._clock()))

    def forward(self, key: LayerKey, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Compute one layer: `compute_all`, or `dispatch` and `PoolCall.combine`."""
        given = key, x_TH, ids_TK, weights_TK
        with self.batch.tracing(key):
            out_TH = self.compute_all(*given)
            return self.dispatch(*given).combine() if out_TH is None else out_TH

    def compute_all(
        self,
        key: LayerKey,
        x_TH: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        computation: Computation | None = None,
    ) -> Tensor | None:
        """Compute one layer's call here, if hosts have lent all of it and nothing is special.

        The result is that of `dispatch`; None: `dispatch` has to be called. ``computation`` is
        that of `WholeCalls.compute`.
        """
        lent, placement = self._lent_experts, self._dispatcher.placement
        if not lent:
            return None
        began = self._clock()
        if self._waiting.may_have_heard():
            with self._lock:
                self._check_open()
                self._waiting.listen()
                lent.let_go(began)
        if self.batch.dead or self.batch.groups() is not None:
            return None
        given = x_TH, ids_TK, weights_TK
        return self.whole_calls.compute(key, placement, *given, began, computation)

    @torch.no_grad()
    def dispatch(
        self, key: LayerKey, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, keep: bool = False
    ) -> PoolCall:
        """Send one layer's call to the hosts, and return it at once.

        What hosts have lent is computed here, in `PoolCall.compute`. With ``keep`` a `backward`
        follows, for which hosts may keep activations.

        Its result is the weighted sum of the chosen experts: (T, H) in x's dtype and on its device.
        A choice outside [0, experts) is skipped. Each call must be combined or cancelled; its
        tensors must not change before, because a part of them may be sent again.
        """
        if x_TH.shape[0] == 0:
            return PoolCall(self, None, x_TH)
        check_tensors(x_TH, ids_TK, weights_TK)
        return PoolCall(self, self._dispatch(key, x_TH, ids_TK, weights_TK, keep=keep), x_TH)

    def _dispatch(
        self,
        key: LayerKey,
        x_TH: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        *,
        again: bool = False,
        keep: bool = False,
    ) -> RunningCall:
        """``again``: the call counted already, and is sent as a whole."""
        if not self.stirred.is_set():
            self.stirred.set()
        with self._lock:
            self._check_open()
            self._waiting.listen()
            given = key, self._dispatcher.placement, x_TH, ids_TK, weights_TK
            dead, exact = self.batch.dead, key.model in self.exact_models
            tensors = LayerTensors(*given, without=dead, step=self.step, keep=keep, exact=exact)
            tensors.trace = self.batch.layer_trace
            options = self.batch.options(tensors.tokens, self.policy.deadline_s)
            if options is not None and options.experts_T is not None:
                tensors.keep_top_experts(options.experts_T)
            began = self._clock()
            self._counts.calls += not again
            self._counts.rows += 0 if again else tensors.tokens
            lent = None if again else self._lent_experts.take(tensors, self._dispatcher, began)
            if lent is not None and (tensors.ids_TK < 0).all():
                return RunningCall(None, tensors, options, began, lent)
            return self._begin(tensors, began, options, lent)

    def _begin(
        self,
        tensors: LayerTensors,
        began: float,
        options: BatchExpertOptions | None = None,
        lent: LentPart | None = None,
    ) -> RunningCall:
        state, begun = self._dispatcher.begin(
            tensors.key,
            tensors.ids_TK,
            max_rows=self._connections.rows_per_call(tensors),
            now=began,
            patience_T=patience(options and options.patience_T, lent, tensors.tokens),
            kind=tensors.kind,
            like=() if tensors.half is None else tensors.half.forward,
        )
        running = RunningCall(state, tensors, options, began, lent)
        self._shell.running[state.number] = running
        try:
            self._shell.execute(begun)
        except BaseException:
            self._over(running)
            raise
        self._waiting.wake_others()
        return running

    @torch.no_grad()
    def backward(self, tensors: LayerTensors) -> tuple[Outcome, int]:
        """Send a call with its backward half; return how it ended, and in how many parts.

        The gradients are in ``tensors`` then. What a host has answered counts for the attempt that
        the half names, whatever becomes of the rest.
        """
        with self._lock:
            self._check_open()
            self._waiting.listen()
            call = self._begin(tensors, self._clock())
            try:
                assert call.state is not None
                return self._outcome_of(call, call.state), call.state.parts
            finally:
                self._over(call)

    def compute(self, call: RunningCall, x_TH: Tensor) -> RunningCall:
        """Compute what hosts have lent, and return the call that has the result.

        If a slot has changed meanwhile, that is another call, which is sent as a whole.
        """
        lent = call.lent
        if lent is None or lent.out is not None:
            return call
        sound = False
        try:
            sound = lent.compute()
        finally:
            if not sound:
                with self._lock:
                    self._over(call)
        return call if sound else self._send_all(call.tensors, x_TH, lent)

    def _send_all(self, tensors: LayerTensors, x_TH: Tensor, lent: LentPart) -> RunningCall:
        """Send a call as a whole: a slot changed that it was computed with."""
        given = tensors.key, x_TH, lent.all_ids_TK, lent.weights_TK
        with self._lock:
            self._lent_experts.changed(tensors.key)
            return self._dispatch(*given, again=True, keep=tensors.keep)

    def combine(self, call: RunningCall, x_TH: Tensor) -> Tensor:
        """Wait for a call, and return its result (see `PoolCall.combine`)."""
        with self._lock:
            try:
                if (out_TH := self._finish(call, x_TH)) is not None:
                    return out_TH
            finally:
                self._over(call)
        assert call.lent is not None
        return self.combine(self._send_all(call.tensors, x_TH, call.lent), x_TH)

    def progress(self) -> float:
        """Handle what has arrived and what is due, without waiting; return when to look again.

        Who waits in `PoolCall.combine` need not call this.
        """
        with self._lock:
            if not self._shell.closed:
                self._waiting.until(self._clock())
            return self._dispatcher.wake_at(self._clock())

    def _finish(self, call: RunningCall, x_TH: Tensor) -> Tensor | None:
        """Wait for what was sent, and add everything up.

        None: no host computed a part of it, and a slot has changed that would make up for that.
        """
        tensors, lent = call.tensors, call.lent
        if lent is not None:
            self._counts.count_lent(tensors.key, lent.used_ids(), lent.reach.count)
        self._check_open()
        if call.state is not None and not self._wait_for(call, call.state):
            return None
        if lent is not None:
            tensors.accept_lent(lent)
        out_TH = tensors.combine()
        if (took_s := self._clock() - call.began) > self.policy.attempt_s:
            self._log.slow(tensors, took_s)
        self._lent_experts.took(lent, took_s)
        if tensors.bad_rows:
            self.batch.report_bad(tensors)
        if self.batch.dead:
            out_TH[[row for row in self.batch.dead if row < tensors.tokens]] = 0.0
        return out_TH.to(device=x_TH.device, dtype=x_TH.dtype)

    def _wait_for(self, call: RunningCall, state: LayerCall) -> bool:
        """Wait until what was sent is answered, made up for or lost; False: nothing of these."""
        outcome, lent = self._outcome_of(call, state), call.lent
        if lent is not None and lent.choice and outcome.lost.size and outcome.error is None:
            return lent.make_up(outcome.lost)
        self.batch.settle(call.tensors, call.options, outcome, self.policy.deadline_s)
        return True

    def _outcome_of(self, call: RunningCall, state: LayerCall) -> Outcome:
        while state.outcome is None and call.error is None:
            self._check_open()
            self._waiting.until(self._dispatcher.wake_at(self._clock()))
        if call.error is not None:
            raise call.error
        assert state.outcome is not None
        return state.outcome

    def cancel(self, call: RunningCall) -> None:
        """End a call without a result."""
        with self._lock:
            self._over(call)

    def _over(self, call: RunningCall) -> None:
        """Forget a call, and end it if it is in progress."""
        if call.state is None:
            return
        self._shell.running.pop(call.state.number, None)
        self._lent_experts.over(call.lent)
        if not self._shell.closed:
            self._shell.execute(self._dispatcher.cancel(call.state, self._clock()))
            self._follow_newest(self._dispatcher.follow_newest(self._clock()))
            self._waiting.wake_others()

    def _check_open(self) -> None:
        if self._shell.closed:
            raise ClusterError(f"router {self.name} is closed")

    def _follow_newest(self, commands: Sequence[RouterCommand]) -> None:
        """Carry out what following the newest placement needs, and report that it is followed."""
        if commands:
            self._shell.execute(commands)
            self.stirred.set()
