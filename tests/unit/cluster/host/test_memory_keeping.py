"""What a memory keeper keeps, of whom, and until when."""

from __future__ import annotations

from collections import Counter

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moesaic.cluster.host.memory_keeping import (
    Answer,
    Close,
    KeeperCommand,
    KeptChunk,
    KeptModel,
    MemoryKeeping,
)

KEEP_S = 30.0
M, N = KeptModel(model="m", descriptor=1), KeptModel(model="n", descriptor=2)


def test_a_successor_gets_what_a_dead_host_has_left() -> None:
    keeping = MemoryKeeping()
    assert keeping.hello("a", "host-0", KEEP_S) == [Answer(connection="a", kept=())]
    assert keeping.keep("a", "m", 1) == []
    assert keeping.keep("a", "n", 2) == []
    assert keeping.lost("a", now=5.0) == []
    assert keeping.wake_at == 5.0 + KEEP_S
    assert keeping.hello("b", "host-0", KEEP_S) == [Answer(connection="b", kept=(M, N))]
    assert keeping.wake_at is None
    # It is kept for the successor's successor, too.
    keeping.lost("b", now=7.0)
    assert keeping.hello("c", "host-0", KEEP_S) == [Answer(connection="c", kept=(M, N))]


def test_a_successor_waits_until_its_predecessor_has_ended() -> None:
    keeping = MemoryKeeping()
    keeping.hello("a", "host-0", KEEP_S)
    keeping.keep("a", "m", 1)
    assert keeping.hello("b", "host-0", KEEP_S) == []
    assert keeping.keep("b", "m", 9) == [Close(descriptor=9)], "it does not have the memory yet"
    assert keeping.lost("a", now=1.0) == [Answer(connection="b", kept=(M,))]


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


def test_chunks_come_and_go() -> None:
    keeping = MemoryKeeping()
    keeping.hello("a", "host-0", KEEP_S)
    assert keeping.keep_chunk("a", "m", KeptChunk(7, 1, 9)) == [Close(descriptor=9)], "of nothing"
    keeping.keep("a", "m", 1)
    assert keeping.keep_chunk("a", "m", KeptChunk(7, 1, 3)) == []
    assert keeping.keep_chunk("a", "m", KeptChunk(8, 2, 4)) == []
    assert keeping.keep_chunk("a", "m", KeptChunk(7, 3, 5)) == [Close(descriptor=3)]
    assert keeping.forget_chunk("a", "m", 7, 1) == [], "other memory has its number"
    assert keeping.forget_chunk("x", "m", 7, 3) == keeping.forget_chunk("a", "n", 7, 3) == []
    assert keeping.forget_chunk("a", "m", 8, 2) == [Close(descriptor=4)]
    assert keeping.forget_chunk("a", "m", 8, 2) == []
    keeping.lost("a", now=0.0)
    kept = KeptModel(model="m", descriptor=1, chunks=(KeptChunk(7, 3, 5),))
    assert keeping.hello("b", "host-0", KEEP_S) == [Answer(connection="b", kept=(kept,))]
    both = [Close(descriptor=1), Close(descriptor=5)]
    assert keeping.keep("b", "m", 6) == both, "chunks are of the memory that they came with"
    keeping.keep_chunk("b", "m", KeptChunk(7, 4, 7))
    assert keeping.forget("b", "m") == [Close(descriptor=6), Close(descriptor=7)]
    keeping.keep("b", "m", 1)
    keeping.keep_chunk("b", "m", KeptChunk(7, 3, 5))
    assert keeping.leave("b", now=0.0) == both


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
        # {host: {model: (descriptor, {chunk: (serial, descriptor)})}}
        self.left: dict[str, dict[str, tuple[int, dict[int, tuple[int, int]]]]] = {}

    def next_number(self) -> int:
        self.numbers += 1
        return self.numbers

    def next_descriptor(self) -> int:
        descriptor = self.next_number()
        self.given.add(descriptor)
        return descriptor

    def owned(self, connection: int) -> dict[str, tuple[int, dict[int, tuple[int, int]]]] | None:
        """What is kept of a connection's host, if it is the one that may change it."""
        host = self.connected[connection]
        return self.left.setdefault(host, {}) if self.owners.get(host) == connection else None

    def follow(self, commands: list[KeeperCommand], *closes: int) -> None:
        """Take note of commands; of answers last, and exactly these descriptors are closed."""
        closed = [command.descriptor for command in commands if isinstance(command, Close)]
        assert sorted(closed) == sorted(closes)
        self.closed.update(closed)
        for command in commands:
            if isinstance(command, Answer):
                assert isinstance(command.connection, int)
                host = self.connected[command.connection]
                assert host not in self.owners, "another process still has it"
                self.owners[host] = command.connection
                assert {
                    kept.model: (
                        kept.descriptor,
                        {chunk.number: (chunk.serial, chunk.descriptor) for chunk in kept.chunks},
                    )
                    for kept in command.kept
                } == self.left.get(host, {})

    def all_of(self, memory: tuple[int, dict[int, tuple[int, int]]] | None) -> list[int]:
        if memory is None:
            return []
        return [memory[0], *(descriptor for _, descriptor in memory[1].values())]

    @rule(host=st.sampled_from(["a", "b"]))
    def hello(self, host: str) -> None:
        connection = self.next_number()
        self.connected[connection] = host
        self.follow(self.keeping.hello(connection, host, KEEP_S))

    @precondition(lambda self: self.connected)
    @rule(data=st.data(), model=st.sampled_from(["m", "n"]))
    def keep(self, data: st.DataObject, model: str) -> None:
        connection, descriptor = self.draw(data), self.next_descriptor()
        owned = self.owned(connection)
        closes = [descriptor] if owned is None else self.all_of(owned.get(model))
        self.follow(self.keeping.keep(connection, model, descriptor), *closes)
        if owned is not None:
            owned[model] = descriptor, {}

    @precondition(lambda self: self.connected)
    @rule(data=st.data(), model=st.sampled_from(["m", "n"]), number=st.integers(0, 3))
    def keep_chunk(self, data: st.DataObject, model: str, number: int) -> None:
        connection, descriptor, serial = self.draw(data), self.next_descriptor(), self.next_number()
        memory = (self.owned(connection) or {}).get(model)
        before = None if memory is None else memory[1].get(number)
        closes = [descriptor] if memory is None else [] if before is None else [before[1]]
        chunk = KeptChunk(number, serial, descriptor)
        self.follow(self.keeping.keep_chunk(connection, model, chunk), *closes)
        if memory is not None:
            memory[1][number] = serial, descriptor

    @precondition(lambda self: self.connected)
    @rule(
        data=st.data(),
        model=st.sampled_from(["m", "n"]),
        number=st.integers(0, 3),
        stale=st.booleans(),
    )
    def forget_chunk(self, data: st.DataObject, model: str, number: int, stale: bool) -> None:
        connection = self.draw(data)
        memory = (self.owned(connection) or {}).get(model)
        serial, descriptor = (memory[1] if memory is not None else {}).get(number, (1, 0))
        closes = [descriptor] if descriptor and not stale else []
        serial += stale
        self.follow(self.keeping.forget_chunk(connection, model, number, serial), *closes)
        if memory is not None and closes:
            del memory[1][number]

    @precondition(lambda self: self.connected)
    @rule(data=st.data(), model=st.sampled_from(["m", "n"]))
    def forget(self, data: st.DataObject, model: str) -> None:
        connection = self.draw(data)
        memory = (self.owned(connection) or {}).pop(model, None)
        self.follow(self.keeping.forget(connection, model), *self.all_of(memory))

    @precondition(lambda self: self.connected)
    @rule(data=st.data(), orderly=st.booleans())
    def end(self, data: st.DataObject, orderly: bool) -> None:
        connection = self.draw(data)
        owned, host = self.owned(connection), self.connected.pop(connection)
        closes: list[int] = []
        if owned is not None:
            del self.owners[host]
            if orderly:
                closes = [one for memory in owned.values() for one in self.all_of(memory)]
                owned.clear()
        leave_or_lose = self.keeping.leave if orderly else self.keeping.lost
        self.follow(leave_or_lose(connection, self.now), *closes)

    @rule(passed_s=st.floats(0.0, KEEP_S))
    def wait(self, passed_s: float) -> None:
        self.now += passed_s
        self.expire(self.now)
        assert self.keeping.wake_at is None or self.keeping.wake_at > self.now

    def expire(self, now: float) -> None:
        commands = self.keeping.advance(now)
        closed = {command.descriptor for command in commands if isinstance(command, Close)}
        for host, kept in self.left.items():
            own = {one for memory in kept.values() for one in self.all_of(memory)}
            if own & closed:
                assert own <= closed, "a host's memory is freed as a whole"
                assert host not in self.owners
                kept.clear()
        self.follow(commands, *closed)

    def draw(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.connected)))

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
        self.expire(self.now + KEEP_S)
        assert self.keeping.is_over
        assert self.closed.keys() == self.given


TestAnyOrder = AnyOrder.TestCase
