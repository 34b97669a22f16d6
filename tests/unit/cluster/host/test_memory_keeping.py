"""What a memory keeper keeps, of whom, and until when."""

from __future__ import annotations

from collections import Counter

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moesaic.cluster.host.memory_keeping import Answer, Close, KeeperCommand, MemoryKeeping

KEEP_S = 30.0
LEFT = (("m", 1), ("n", 2))


def test_a_successor_gets_what_a_dead_host_has_left() -> None:
    keeping = MemoryKeeping()
    assert keeping.hello("a", "host-0", KEEP_S) == [Answer(connection="a", kept=())]
    assert keeping.keep("a", "m", 1) == []
    assert keeping.keep("a", "n", 2) == []
    assert keeping.lost("a", now=5.0) == []
    assert keeping.wake_at == 5.0 + KEEP_S
    assert keeping.hello("b", "host-0", KEEP_S) == [
        Answer(connection="b", kept=(("m", 1), ("n", 2)))
    ]
    assert keeping.wake_at is None
    # It is kept for the successor's successor, too.
    keeping.lost("b", now=7.0)
    assert keeping.hello("c", "host-0", KEEP_S) == [
        Answer(connection="c", kept=(("m", 1), ("n", 2)))
    ]


def test_a_successor_waits_until_its_predecessor_has_ended() -> None:
    keeping = MemoryKeeping()
    keeping.hello("a", "host-0", KEEP_S)
    keeping.keep("a", "m", 1)
    assert keeping.hello("b", "host-0", KEEP_S) == []
    assert keeping.keep("b", "m", 9) == [Close(descriptor=9)], "it does not have the memory yet"
    assert keeping.lost("a", now=1.0) == [Answer(connection="b", kept=(("m", 1),))]


def test_what_nobody_asks_for_is_freed_in_time() -> None:
    keeping = MemoryKeeping()
    keeping.hello("a", "host-0", KEEP_S)
    keeping.keep("a", "m", 1)
    keeping.lost("a", now=0.0)
    assert keeping.advance(KEEP_S - 0.1) == []
    assert not keeping.is_over
    assert keeping.advance(KEEP_S) == [Close(descriptor=1)]
    assert keeping.is_over
    assert keeping.hello("b", "host-0", KEEP_S) == [Answer(connection="b", kept=())]


def test_a_host_that_leaves_leaves_nothing() -> None:
    keeping = MemoryKeeping()
    keeping.hello("a", "host-0", KEEP_S)
    keeping.keep("a", "m", 1)
    assert keeping.leave("a", now=0.0) == [Close(descriptor=1)]
    assert keeping.is_over
    assert keeping.lost("a", now=0.0) == []


def test_a_models_newer_memory_takes_the_place_of_the_older() -> None:
    keeping = MemoryKeeping()
    keeping.hello("a", "host-0", KEEP_S)
    keeping.keep("a", "m", 1)
    assert keeping.keep("a", "m", 2) == [Close(descriptor=1)]


def test_what_a_successor_cannot_use_is_freed() -> None:
    keeping = MemoryKeeping()
    keeping.hello("a", "host-0", KEEP_S)
    keeping.keep("a", "m", 1)
    assert keeping.forget("a", "n") == []
    assert keeping.forget("x", "m") == []
    assert keeping.forget("a", "m") == [Close(descriptor=1)]
    assert keeping.forget("a", "m") == []


def test_a_second_hello_changes_nothing() -> None:
    keeping = MemoryKeeping()
    keeping.hello("a", "host-0", KEEP_S)
    assert keeping.hello("a", "host-0", KEEP_S) == keeping.hello("a", "host-1", KEEP_S) == []
    keeping.lost("a", now=0.0)
    assert keeping.is_over


def test_strangers_cannot_have_anything_kept() -> None:
    keeping = MemoryKeeping()
    assert keeping.keep("x", "m", 1) == [Close(descriptor=1)]
    assert keeping.leave("x", now=0.0) == []
    assert keeping.is_over


class AnyOrder(RuleBasedStateMachine):
    """Each descriptor is kept or closed once, and one process at a time has a host's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.keeping = MemoryKeeping()
        self.now = 0.0
        self.numbers = 0
        self.given: set[int] = set()
        self.closed: Counter[int] = Counter()
        self.connected: dict[int, str] = {}
        self.owners: dict[str, int] = {}
        self.left: dict[str, set[int]] = {}

    def next_number(self) -> int:
        self.numbers += 1
        return self.numbers

    def follow(self, commands: list[KeeperCommand]) -> None:
        for command in commands:
            if isinstance(command, Close):
                self.closed[command.descriptor] += 1
                continue
            assert isinstance(command.connection, int)
            host = self.connected[command.connection]
            assert host not in self.owners, "another process still has it"
            self.owners[host] = command.connection
            kept = {descriptor for _, descriptor in command.kept}
            assert kept == self.left.get(host, set()) - self.closed.keys()

    @rule(host=st.sampled_from(["a", "b"]))
    def hello(self, host: str) -> None:
        connection = self.next_number()
        self.connected[connection] = host
        self.follow(self.keeping.hello(connection, host, KEEP_S))

    @precondition(lambda self: self.connected)
    @rule(data=st.data(), model=st.sampled_from(["m", "n"]))
    def keep(self, data: st.DataObject, model: str) -> None:
        connection = data.draw(st.sampled_from(sorted(self.connected)))
        descriptor = self.next_number()
        self.given.add(descriptor)
        self.follow(self.keeping.keep(connection, model, descriptor))
        if descriptor not in self.closed:
            self.left.setdefault(self.connected[connection], set()).add(descriptor)

    @precondition(lambda self: self.connected)
    @rule(data=st.data(), model=st.sampled_from(["m", "n"]))
    def forget(self, data: st.DataObject, model: str) -> None:
        connection = data.draw(st.sampled_from(sorted(self.connected)))
        self.follow(self.keeping.forget(connection, model))

    @precondition(lambda self: self.connected)
    @rule(data=st.data(), orderly=st.booleans())
    def end(self, data: st.DataObject, orderly: bool) -> None:
        connection = data.draw(st.sampled_from(sorted(self.connected)))
        host = self.connected.pop(connection)
        if self.owners.get(host) == connection:
            del self.owners[host]
        leave_or_lose = self.keeping.leave if orderly else self.keeping.lost
        self.follow(leave_or_lose(connection, self.now))

    @rule(passed_s=st.floats(0.0, KEEP_S))
    def wait(self, passed_s: float) -> None:
        self.now += passed_s
        self.follow(self.keeping.advance(self.now))
        assert self.keeping.wake_at is None or self.keeping.wake_at > self.now

    @invariant()
    def closes_once(self) -> None:
        assert all(count == 1 for count in self.closed.values())
        assert self.closed.keys() <= self.given

    def teardown(self) -> None:
        for connection in sorted(self.connected):
            host = self.connected.pop(connection)
            if self.owners.get(host) == connection:
                del self.owners[host]
            self.follow(self.keeping.lost(connection, self.now))
        self.follow(self.keeping.advance(self.now + KEEP_S))
        assert self.keeping.is_over
        assert self.closed.keys() == self.given


TestAnyOrder = AnyOrder.TestCase
