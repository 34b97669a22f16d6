"""A simulated trunk process: a real `Router`, and models that make calls.

Only what waits is rewritten here: the thread that watches placements, and the model's own, which
looks at its calls when something arrives or is due instead of waiting for them.

Shape suffixes: T = tokens, K = experts of a token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...cluster.expert_keys import LayerKey
from ...cluster.placement import HostEntry, Placement, PlacementNews, VersionChange
from ...cluster.routing.expert_options import ExpertOptions, MissingExpert, RowGroups
from ...cluster.routing.transports import Transport
from ...cluster.versions import LayerVersions
from ...proto.errors import HostLost, MoesaicError
from ...proto.expert_pb2 import Frame
from ...proto.wire import WIRE_VERSION
from ..router.pool_call import PoolCall
from ..router.router import Router
from ..transport.base import Channel
from .channels import SimChannel, SimPoller
from .clock import SimProcess
from .experts import forms_of, rows_of
from .network import Answered, Connection, Parcel, Result
from .trace_events import Ended, Followed

if TYPE_CHECKING:
    from .controller import SimController
    from .world import World


_LONGEST_WAIT_S = 5.0


@dataclass(slots=True, eq=False)
class SimCall:
    """One layer's call, as the model that made it sees it."""

    sent: PoolCall | None  # None: it was computed at once
    key: LayerKey
    ids_TK: np.ndarray
    versions: LayerVersions  # that its experts had when it began
    deadline: float
    until_T: np.ndarray  # time until which each token waits for a missing expert
    groups: RowGroups
    # Tokens that were lost, and why: by this call, and by others of the same forward pass.
    lost: dict[int, MoesaicError] = field(default_factory=dict)
    dead: frozenset[int] = frozenset()


class SimRouter(SimProcess):
    """One trunk: it makes calls, several at a time, and watches placements."""

    def __init__(self, name: str, node: str, world: World) -> None:
        super().__init__(name, world.clock)
        self.node = node
        self.world = world
        settings = world.settings
        self._poller = SimPoller()
        self.router = Router(
            name=name,
            node=node,
            policy=settings.router,
            clock=lambda: self.clock.now,
            forms=forms_of(settings.models) if settings.lends else None,
            connect=self._connect,
            poller=self._poller,
        )
        self.router.batch.owned_by(self)
        self.calls: list[SimCall] = []  # that have not ended
        # When a report of this router last reached a controller, and since when its lease has been
        # valid without a gap.
        self.heard_at = self.leased_since = -float("inf")
        self._channels: dict[Connection, SimChannel] = {}
        self._groups: RowGroups | None = None  # of the call that is made or ends now
        self._lost: dict[int, MoesaicError] = {}  # rows of the call that ends now
        self._in_step = False
        self._news: deque[PlacementNews] = deque()
        self._newest: Placement | None = None
        self._controller: SimController | None = None
        self._stopping = False
        self._watch()
        self.alarm("thinks", self.clock.now + settings.think_s, self._begin)

    @property
    def placement(self) -> Placement | None:
        return self.router.placement

    def stop(self) -> None:
        """Begin no more calls; those in progress go on."""
        self._stopping = True
        if not self.calls:
            self._end_step()

    def kill(self) -> None:
        super().kill()
        self.router.close()

    # ---- the thread that watches placements -----------------------------------------------------

    def was_heard(self, now: float) -> None:
        """Take note that a report has reached a controller, which renews the lease."""
        if now - self.heard_at > self.world.settings.control.lease_s:
            self.leased_since = now
        self.heard_at = now

    def _watch(self) -> None:
        if self._controller is None or not self._controller.alive:
            self._controller = self.world.registry.controller
        controller = self._controller
        if controller is None:
            self._watch_later()
            return
        self._take_placements()
        report = self.router.take_load()
        watch_s = self.world.settings.watch_s
        self.world.network.call(
            self,
            controller,
            f"{self.name} reports to {controller.name}",
            lambda respond: controller.hear_report(self, report, watch_s, respond),
            self._watched,
            timeout_s=watch_s + self.world.settings.patience_s,
        )

    def _watched(self, result: Result) -> None:
        if not isinstance(result, Answered):
            self._controller = None
            self._watch_later()
            return
        if isinstance(result.value, Placement | VersionChange):
            self._news.append(result.value)
            self._wake_up()
        self._watch()

    def _watch_later(self) -> None:
        self.alarm("watches", self.clock.now + self.world.settings.rest_s, self._watch)

    def move_to(self, controller: SimController) -> None:
        """Report to another controller from now on, as Ray says."""
        self._controller = controller

    def _take_placements(self) -> None:
        while self._news:
            news = self._news.popleft()
            if isinstance(news, VersionChange):
                assert self._newest is not None, "it had reported a placement"
                news = news.applied_to(self._newest)
            self._newest = news
            self.router.place(news)
            followed = self.placement
            assert followed is not None
            self.world.tell(Followed(self, followed.id))

    # ---- its connections ------------------------------------------------------------------------

    def _connect(self, entry: HostEntry, transport: Transport, **more: Any) -> Channel:
        host = self.world.hosts.get(entry.host)
        if host is None or not host.alive or host.incarnation != entry.incarnation:
            raise HostLost(f"{entry.host} is not there")
        connection = self.world.network.connect(self, host, slots=more["slots"])
        channel = SimChannel(connection, self.world.network)
        self._channels[connection] = channel
        self._poller.know(channel)
        hello = Frame()
        hello.hello.wire_version = WIRE_VERSION
        hello.hello.router = self.name
        hello.hello.borrows = more["borrows"] and transport == "shm"
        channel.send(hello)
        return channel

    def hear(self, connection: Connection, parcel: Parcel) -> None:
        channel = self._channels.get(connection)
        if channel is not None:
            channel.put(parcel)
            self._wake_up()

    def ended(self, connection: Connection) -> None:
        channel = self._channels.pop(connection, None)
        if channel is not None:
            channel.end()
            self._wake_up()

    def _wake_up(self) -> None:
        # A router waits for events only while a call is in progress.
        if self.calls:
            self._turn()
        else:
            self._take_placements()

    # ---- the model's thread ---------------------------------------------------------------------

    def _begin(self) -> None:
        if self._stopping:
            return
        self._take_placements()
        settings, now = self.world.settings, self.clock.now
        asked = self.world.traffic.next(self.placement)
        if asked is None or len(self.calls) >= settings.calls_at_once:
            self.alarm("thinks", now + settings.think_s, self._begin)
            return
        if not self._in_step:
            self.router.begin_step()
            self._in_step = True
        assert self.placement is not None
        versions = self.placement.versions.layer(asked.key)
        x_TH, weights_TK = rows_of(asked.ids_TK)
        ids_TK = torch.from_numpy(asked.ids_TK)
        given = asked.key, x_TH, ids_TK, weights_TK
        self.world.calls += 1
        at_once_TH = None
        if self.world.traffic.is_plain():
            self._groups = None
            at_once_TH = self.router.compute_all(*given)
        self._groups = _groups(asked.patience_T)
        call = SimCall(
            self.router.dispatch(*given) if at_once_TH is None else None,
            asked.key,
            asked.ids_TK,
            versions,
            deadline=now + settings.router.deadline_s,
            until_T=now + asked.patience_T,
            groups=self._groups,
        )
        self.alarm("thinks", now + self.world.traffic.pause_s(), self._begin)
        if at_once_TH is not None:
            self.world.tell(Ended(self, call, at_once_TH.numpy()))
        else:
            self.calls.append(call)
            compute_s = self.world.traffic.compute_s()
            what = f"{self.name}: computes what was lent"
            self.reach(compute_s, what, lambda: self._compute(call))
        self._turn()

    def _compute(self, call: SimCall) -> None:
        if call in self.calls:
            self._groups = call.groups
            _sent(call).compute()
            # What has changed meanwhile is sent as another call.
            call.deadline = self.clock.now + self.world.settings.router.deadline_s
            self._turn()

    def _turn(self) -> None:
        """Handle what has arrived or is due, as a thread in `PoolCall.combine` does."""
        self._take_placements()
        wake_at = self.router.progress()
        for call in [one for one in self.calls if _sent(one).done]:
            self._end(call)
        if self.calls:
            self.alarm("waits", min(wake_at, self.clock.now + _LONGEST_WAIT_S), self._turn)
        elif self._stopping or self.world.traffic.step_ends():
            self._end_step()

    def _end(self, call: SimCall) -> None:
        self.calls.remove(call)
        self._groups, self._lost = call.groups, call.lost
        result_TH = _sent(call).combine().numpy()
        call.dead = frozenset(self.router.batch.dead)
        self.world.tell(Ended(self, call, result_TH))

    def _end_step(self) -> None:
        if self._in_step:
            self._in_step = False
            self.router.end_step()

    # ---- what the router asks of an engine ------------------------------------------------------

    def row_groups(self) -> RowGroups | None:
        return self._groups

    def fail_rows(self, rows: Sequence[int], error: MoesaicError) -> None:
        self._lost |= dict.fromkeys(rows, error)

    def drop_rows(self, dropped: Mapping[int, float]) -> None:
        raise AssertionError("no row of the simulator goes on without an expert")

    def log_step(self, router: str, step: int) -> None:
        """Log and trace nothing: the world has its own log."""


def _sent(call: SimCall) -> PoolCall:
    assert call.sent is not None
    return call.sent


def _groups(patience_T: np.ndarray) -> RowGroups:
    """Return options with which each token waits that long for a missing expert."""
    return [
        (1, ExpertOptions(missing=MissingExpert(mode="fail", wait_s=float(patience_s))))
        for patience_s in patience_T
    ]
