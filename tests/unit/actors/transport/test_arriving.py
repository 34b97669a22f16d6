"""Whatever comes in chunks, in whatever order: its bytes are bounded, and all of them come back."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from moesaic.actors.transport.budget import SharedLimit
from moesaic.actors.transport.grpc.inbox import Inbox
from moesaic.proto.errors import CallError
from moesaic.proto.expert_pb2 import Call, Frame, Reply

MOST, LARGEST = 300, 200
# Which router, its call, the size that it announces, what comes of it, and whether more is to come.
CHUNK = st.tuples(
    st.integers(0, 2), st.integers(1, 3), st.integers(0, 250), st.integers(0, 120), st.booleans()
)


class Router:
    """One router's stream, and the loop that takes its frames."""

    def __init__(self, budget: SharedLimit) -> None:
        self.share = budget.share()
        self.inbox = Inbox(
            "router",
            threading.Event(),
            kinds=("call", "cancel"),
            max_payload_bytes=LARGEST,
            max_arriving_bytes=2 * LARGEST,
            check=check,
            accept=lambda kind, frame: True,
            arriving=self.share,
        )
        self.begun: dict[int, int] = {}

    def hear(self, seq: int, size: int, part: int, more: bool) -> None:
        frame = Frame()
        call = frame.call
        call.seq, call.payload, call.more = seq, bytes(part), more
        if seq not in self.begun:
            call.payload_bytes = size
            self.begun[seq] = size
        if not more:
            del self.begun[seq]
        self.inbox.read(iter([frame.SerializeToString()]), full=lambda: False)

    def take(self) -> None:
        if self.inbox.error is None:
            for inbound in self.inbox.receive():
                assert (inbound.payload is None) == (inbound.refused is not None)


def check(kind: str, part: Call | Reply) -> None:
    if part.payload_bytes % 7 == 3:
        raise CallError("rows: no call has this size")


@given(st.lists(st.one_of(CHUNK, st.integers(0, 5)), max_size=40))
def test_arriving_bytes_are_bounded_and_come_back(
    steps: list[tuple[int, int, int, int, bool] | int],
) -> None:
    budget = SharedLimit(MOST, "bytes")
    routers = [Router(budget) for _ in range(3)]
    for step in steps:
        if isinstance(step, int):  # the loop looks at one, or one leaves
            router = routers[step % 3]
            if step < 3:
                router.take()
            else:
                router.inbox.close()
                routers[step % 3] = Router(budget)
        elif routers[step[0]].inbox.error is None:
            routers[step[0]].hear(*step[1:])
        assert 0 <= budget.held <= MOST
        assert budget.held == sum(router.share.held for router in routers)
    for router in routers:
        router.inbox.close()
    assert budget.held == 0
