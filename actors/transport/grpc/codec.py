"""Frames with tensors as gRPC messages: plain protobuf, with little copying.

In protobuf, the fields of a message may come in any order, and the parts of one submessage are
merged. So `encode` writes the tensors of a large frame first, in a submessage of their own, and
then everything else:

    Frame.call { payload = ... } Frame.call { seq = 7 rows = 3 ... }

To protobuf this is an ordinary frame. `decode` looks at a few bytes, takes a view of the tensors,
and lets protobuf parse the small rest. It parses a message in any other order as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from google.protobuf.message import DecodeError

from ....proto.errors import CallError
from ....proto.expert_pb2 import Backward, Call, Frame, Reply

# Up to this size, copying the payload costs less than avoiding the copy.
_SMALL_BYTES = 16 << 10
_LENGTH_DELIMITED = 2

# For each kind of frame with tensors: the part that has `payload`, `payload_bytes` and `more`.
PARTS: dict[str, Callable[[Frame], Call | Reply]] = {
    "call": attrgetter("call"),
    "backward": attrgetter("backward.call"),
    "reply": attrgetter("reply"),
}


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """Return (value, offset of the byte after it)."""
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80 or shift > 35:
            return value, at


def _tags(*fields: int) -> tuple[bytes, ...]:
    return tuple(_varint(field << 3 | _LENGTH_DELIMITED) for field in fields)


# The tags that lead to the payload of each kind of frame, from the outermost in.
_PATHS = {
    "call": _tags(Frame.CALL_FIELD_NUMBER, Call.PAYLOAD_FIELD_NUMBER),
    "backward": _tags(
        Frame.BACKWARD_FIELD_NUMBER, Backward.CALL_FIELD_NUMBER, Call.PAYLOAD_FIELD_NUMBER
    ),
    "reply": _tags(Frame.REPLY_FIELD_NUMBER, Reply.PAYLOAD_FIELD_NUMBER),
}
_KIND_OF_FIRST_BYTE = {path[0][0]: kind for kind, path in _PATHS.items()}


def encode(kind: str, frame: Frame, payload: memoryview) -> bytes:
    """Serialise a frame with its payload. The frame may be changed."""
    if len(payload) <= _SMALL_BYTES:
        PARTS[kind](frame).payload = payload.tobytes()
        return frame.SerializeToString()
    # Built from the innermost level out: each level is its tag, the length of what follows, and
    # then the levels inside it.
    front = b""
    for tag in reversed(_PATHS[kind]):
        front = tag + _varint(len(front) + len(payload)) + front
    return b"".join((front, payload, frame.SerializeToString()))


def decode(message: bytes) -> tuple[str, Frame, bytes | memoryview]:
    """Return (kind, frame without payload, payload).

    The payload is a view of ``message`` if that is large. Raises CallError if the message is not a
    frame.
    """
    if len(message) > _SMALL_BYTES:
        found = _decode_payload_first(message)
        if found is not None:
            return found
    frame = _parse(message)
    kind = frame.WhichOneof("kind") or "unknown"
    part_of = PARTS.get(kind)
    if part_of is None:
        return kind, frame, b""
    part = part_of(frame)
    payload = part.payload
    part.ClearField("payload")
    return kind, frame, payload


def _decode_payload_first(message: bytes) -> tuple[str, Frame, memoryview] | None:
    kind = _KIND_OF_FIRST_BYTE.get(message[0])
    if kind is None:
        return None
    at, ends = 0, set()
    for tag in _PATHS[kind]:
        if not message.startswith(tag, at):
            return None
        size, at = _read_varint(message, at + len(tag))
        ends.add(at + size)
    end = ends.pop()
    # If the nested levels end at different offsets, other fields follow the payload in one of them.
    if ends or end > len(message):
        return None
    frame = _parse(message[end:])
    if frame.WhichOneof("kind") != kind or PARTS[kind](frame).payload:
        return None
    return kind, frame, memoryview(message)[at:end]


def _parse(message: bytes) -> Frame:
    try:
        return Frame.FromString(message)
    except DecodeError as error:
        raise CallError(f"the message is not a frame: {error}") from error
