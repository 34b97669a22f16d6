"""Where tensors lie on the wire, and how frames become messages and frames again."""

from __future__ import annotations

import select
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.actors.transport.grpc.codec import PARTS, decode, encode
from moesaic.actors.transport.grpc.inbox import Inbox
from moesaic.actors.transport.grpc.outbox import Outbox
from moesaic.actors.transport.mailbox import Mailbox
from moesaic.proto.errors import CallError, HostLost
from moesaic.proto.expert_pb2 import FLOAT32, Call, Frame
from moesaic.proto.limits import CHUNK_BYTES
from moesaic.proto.wire import (
    ALIGNMENT_BYTES,
    DTYPE_TO_WIRE,
    MAX_HIDDEN,
    MAX_PAYLOAD_BYTES,
    MAX_TOP_K,
    CallLayout,
)

layouts = st.builds(
    CallLayout.of,
    rows=st.integers(1, 70),
    hidden=st.integers(1, 130),
    top_k=st.integers(1, 9),
    dtype=st.sampled_from(list(DTYPE_TO_WIRE)),
    exact=st.booleans(),
    backward=st.booleans(),
)


def call_for(layout: CallLayout) -> Call:
    return Call(
        rows=layout.rows,
        hidden=layout.hidden,
        top_k=layout.top_k,
        dtype=DTYPE_TO_WIRE[layout.dtype],
        exact=layout.exact,
        payload_bytes=layout.call_bytes,
    )


# ---- layouts ------------------------------------------------------------------------------------


@given(layouts)
def test_sections_are_aligned_and_apart(layout: CallLayout) -> None:
    x_end = layout.rows * layout.hidden * layout.dtype.itemsize
    ids_bytes = layout.rows * layout.top_k * 4
    weight_bytes = layout.rows * layout.top_k * layout.wide.itemsize
    grad_bytes = layout.rows * layout.hidden * layout.wide.itemsize if layout.backward else 0
    assert x_end <= layout.ids_offset
    assert layout.ids_offset + ids_bytes <= layout.weights_offset
    assert layout.weights_offset + weight_bytes <= layout.grad_offset
    assert layout.grad_offset + grad_bytes <= layout.call_bytes
    offsets = layout.ids_offset, layout.weights_offset, layout.grad_offset, layout.call_bytes
    for offset in (*offsets, layout.slot_bytes):
        assert offset % ALIGNMENT_BYTES == 0
    # No more than alignment is wasted.
    needed = x_end + ids_bytes + weight_bytes + grad_bytes
    assert layout.call_bytes < needed + 4 * ALIGNMENT_BYTES
    assert layout.slot_bytes >= layout.call_bytes + layout.reply_bytes


@given(layouts)
def test_what_is_written_is_read(layout: CallLayout) -> None:
    buffer = torch.full((layout.slot_bytes,), 0xEE, dtype=torch.uint8)
    x_TH, ids_TK, weights_TK = layout.call_tensors(buffer)
    assert x_TH.shape == (layout.rows, layout.hidden)
    assert ids_TK.shape == weights_TK.shape == (layout.rows, layout.top_k)
    assert (x_TH.dtype, ids_TK.dtype) == (layout.dtype, torch.int32)
    x, ids, weights = torch.randn(x_TH.shape).to(layout.dtype), torch.arange(ids_TK.numel()), 0.25
    x_TH.copy_(x)
    ids_TK.copy_(ids.view(ids_TK.shape))
    weights_TK.fill_(weights)
    answer = buffer[layout.call_bytes :]
    reply = layout.reply_tensor(answer)
    reply.fill_(3.0)
    if layout.backward:
        layout.grad_tensor(buffer).fill_(5.0)
        layout.grad_weights_tensor(answer).fill_(7.0)
        assert bool((layout.grad_tensor(buffer) == 5.0).all())
        assert bool((layout.grad_weights_tensor(answer) == 7.0).all())
        assert layout.grad_weights_tensor(answer).shape == (layout.rows, layout.top_k)
    x_TH, ids_TK, weights_TK = layout.call_tensors(buffer)
    assert torch.equal(x_TH, x)
    assert torch.equal(ids_TK.reshape(-1), ids.to(torch.int32))
    assert bool((weights_TK == weights).all())
    assert bool((reply == 3.0).all())
    assert layout.backward or reply.nbytes == layout.reply_bytes
    assert reply.shape[:-1] == ((layout.rows, layout.top_k) if layout.exact else (layout.rows,))


@given(layouts)
def test_a_call_says_its_layout(layout: CallLayout) -> None:
    assert CallLayout.of_call(call_for(layout), backward=layout.backward) == layout


lies = {
    "rows": st.sampled_from([0, MAX_PAYLOAD_BYTES + 1, (1 << 32) - 1]),
    "hidden": st.sampled_from([0, MAX_HIDDEN + 1, (1 << 32) - 1]),
    "top_k": st.sampled_from([0, MAX_TOP_K + 1, (1 << 32) - 1]),
    "dtype": st.sampled_from([0, 5, 99]),
    "payload_bytes": st.integers(0, 1 << 63),
}


@given(layouts, st.sampled_from(sorted(lies)).flatmap(lambda n: st.tuples(st.just(n), lies[n])))
def test_lies_are_refused_by_name(layout: CallLayout, lie: tuple[str, int]) -> None:
    field, value = lie
    call = call_for(layout)
    if getattr(call, field) == value:
        return
    setattr(call, field, value)
    with pytest.raises(CallError, match=field):
        CallLayout.of_call(call, backward=layout.backward)


@given(st.sampled_from(["rows", "hidden", "top_k"]), st.integers(1, 1 << 17))
def test_no_call_takes_more_than_it_may(field: str, value: int) -> None:
    call = Call(rows=1 << 14, hidden=1 << 13, top_k=8, dtype=FLOAT32, exact=True)
    setattr(call, field, value)
    call.payload_bytes = 1
    with pytest.raises(CallError):
        CallLayout.of_call(call)


# ---- messages -----------------------------------------------------------------------------------

SIZES = st.one_of(st.integers(0, 300), st.sampled_from([16384, 16385, 20000, 1 << 17, 1 << 20]))


def frame_of(kind: str, seq: int, size: int) -> Frame:
    frame = Frame()
    part = PARTS[kind](frame)
    part.seq, part.payload_bytes = seq, size
    if kind == "backward":
        frame.backward.step = 9
    return frame


@given(st.sampled_from(sorted(PARTS)), st.integers(1, 1 << 60), SIZES)
@settings(max_examples=60)
def test_messages_are_plain_protobuf(kind: str, seq: int, size: int) -> None:
    payload = bytes(i & 0xFF for i in range(251)) * (size // 251 + 1)
    payload = payload[:size]
    message = encode(kind, frame_of(kind, seq, size), memoryview(payload))
    plain = frame_of(kind, seq, size)
    PARTS[kind](plain).payload = payload
    assert Frame.FromString(message) == plain
    # Both our messages and protobuf's own are understood.
    for form in (message, plain.SerializeToString()):
        found, frame, got = decode(form)
        assert (found, frame) == (kind, frame_of(kind, seq, size))
        assert bytes(got) == payload


@given(st.sampled_from(sorted(PARTS)), st.integers(0, 40000), st.integers(0, 255))
@settings(max_examples=200)
def test_a_damaged_message_is_what_protobuf_says(kind: str, at: int, value: int) -> None:
    message = bytearray(encode(kind, frame_of(kind, 3, 30000), memoryview(bytes(30000))))
    message[at % len(message)] = value
    _agrees_with_protobuf(bytes(message))


@given(st.binary(max_size=64))
def test_rubbish_is_what_protobuf_says(data: bytes) -> None:
    _agrees_with_protobuf(data)
    _agrees_with_protobuf(data + bytes(20000))


def _agrees_with_protobuf(message: bytes) -> None:
    try:
        kind, frame, payload = decode(message)
    except CallError:
        # protobuf drops a field that it does not know; a frame of no kind is refused later.
        with pytest.raises(Exception, match="pars"):
            Frame.FromString(message)
        return
    if kind in PARTS:
        PARTS[kind](frame).payload = bytes(payload)
    assert frame == Frame.FromString(message)


# ---- queues -------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5 * CHUNK_BYTES // 2), min_size=1, max_size=5))
@settings(max_examples=15, deadline=None)
def test_chunks_come_together_again(sizes: list[int]) -> None:
    moved = threading.Event()
    outbox = Outbox(moved)
    inbox = Inbox(
        "peer",
        moved,
        kinds=("call",),
        max_payload_bytes=MAX_PAYLOAD_BYTES,
        max_arriving_bytes=MAX_PAYLOAD_BYTES,
        check=lambda kind, part: None,
        accept=lambda kind, frame: True,
    )
    for seq, size in enumerate(sizes):
        payload = torch.full((size,), seq, dtype=torch.uint8)
        outbox.send_tensors("call", frame_of("call", seq, size), payload.numpy().data)
    outbox.finish()
    messages = list(outbox)
    assert all(len(message) <= CHUNK_BYTES + 100 for message in messages)
    assert outbox.unsent_bytes == 0
    inbox.read(iter(messages), full=lambda: False)
    heard = {inbound.frame.call.seq: inbound for inbound in inbox.receive()}
    assert inbox.waiting_bytes == 0
    assert sorted(heard) == list(range(len(sizes)))
    for seq, size in enumerate(sizes):
        payload = heard[seq].payload
        assert payload is not None
        assert payload.numel() == size
        assert bool((payload == seq).all())
        assert heard[seq].frame == frame_of("call", seq, size)
    inbox.close()


def test_large_frames_take_turns() -> None:
    outbox = Outbox(threading.Event())
    for seq, chunks in ((1, 3), (2, 1), (3, 2)):
        payload = torch.zeros(chunks * CHUNK_BYTES, dtype=torch.uint8)
        outbox.send_tensors("call", frame_of("call", seq, payload.numel()), payload.numpy().data)
    outbox.finish()
    assert [decode(message)[1].call.seq for message in outbox] == [1, 2, 3, 1, 3, 1]


def test_a_mailbox_loses_no_wake_up() -> None:
    mailbox: Mailbox[int] = Mailbox()
    total, putters = 20_000, 2

    def put() -> None:
        for number in range(total):
            mailbox.put(number)

    threads = [threading.Thread(target=put) for _ in range(putters)]
    for thread in threads:
        thread.start()
    poll = select.poll()
    poll.register(mailbox.fileno(), select.POLLIN)
    taken = 0
    while taken < putters * total:
        assert poll.poll(10_000), f"asleep with {len(mailbox)} items waiting"
        taken += len(mailbox.take())
    for thread in threads:
        thread.join(10)
    mailbox.take()
    assert not poll.poll(0)
    mailbox.end()
    assert poll.poll(0)
    assert not mailbox.take()
    assert poll.poll(0), "an end stays readable"
    mailbox.close()
    mailbox.put(1)  # after the end nobody is woken, and no descriptor is touched


def test_what_was_heard_before_the_end_comes_first() -> None:
    inbox = Inbox(
        "peer",
        threading.Event(),
        kinds=("call",),
        max_payload_bytes=100,
        max_arriving_bytes=100,
        check=lambda kind, part: None,
        accept=lambda kind, frame: True,
    )
    good = encode("call", frame_of("call", 1, 4), memoryview(b"1234"))
    inbox.read(iter([good, b"\xff", good]), full=lambda: False)
    assert [inbound.frame.call.seq for inbound in inbox.receive()] == [1]
    for _ in range(2):
        with pytest.raises(HostLost, match="peer: the message is not a frame"):
            inbox.receive()
    inbox.close()
