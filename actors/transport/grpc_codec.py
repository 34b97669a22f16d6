"""Frames with tensors as gRPC messages: plain protobuf, written so that no tensor is copied twice.

A field of a message may come in any order, and parts of one submessage are merged. So the tensors
stand first, as a submessage of nothing but `payload`, and everything else follows:

    Frame.call { payload = ... } Frame.call { seq = 7 rows = 3 ... }

To protobuf that is one frame like any other; to `decode` it is a few bytes to look at, a view of
the tensors, and a small header for protobuf to parse. A frame in any other order is parsed whole.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from ...proto.errors import CallError
from ...proto.expert_pb2 import Backward, Call, Frame, Reply

NO_PAYLOAD = memoryview(b"")
_LENGTH_DELIMITED = 2


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _tags(*fields: int) -> tuple[bytes, ...]:
    return tuple(_varint(field << 3 | _LENGTH_DELIMITED) for field in fields)


# Where the payload of each kind of frame stands: tags from the outermost to the payload itself.
_PATHS = {
    "call": _tags(Frame.CALL_FIELD_NUMBER, Call.PAYLOAD_FIELD_NUMBER),
    "backward": _tags(
        Frame.BACKWARD_FIELD_NUMBER, Backward.CALL_FIELD_NUMBER, Call.PAYLOAD_FIELD_NUMBER
    ),
    "reply": _tags(Frame.REPLY_FIELD_NUMBER, Reply.PAYLOAD_FIELD_NUMBER),
}
_KIND_OF_FIRST_BYTE = {path[0][0]: kind for kind, path in _PATHS.items()}


def has_payload(kind: str) -> bool:
    return kind in _PATHS


def body(frame: Frame, kind: str) -> Call | Reply:
    """The part of a call, backward or reply that has the payload, its size and ``more``."""
    if kind == "reply":
        return frame.reply
    return frame.call if kind == "call" else frame.backward.call


def encode(kind: str, header: bytes, payload: memoryview) -> bytes:
    """The message of a frame: ``header``, serialized without payload, and the payload."""
    if not payload:
        return header
    start = b""
    for tag in reversed(_PATHS[kind]):
        start = tag + _varint(len(start) + len(payload)) + start
    return b"".join((start, payload, header))


def decode(message: bytes) -> tuple[str, Frame, memoryview]:
    """(kind, frame without payload, payload as a view of ``message`` where possible).

    Raises CallError when the message is no frame.
    """
    found = _decode_payload_first(message)
    if found is not None:
        return found
    frame = _parse(message)
    kind = frame.WhichOneof("kind")
    if kind is None:
        raise CallError("a frame of no kind")
    if not has_payload(kind):
        return kind, frame, NO_PAYLOAD
    part = body(frame, kind)
    payload = memoryview(part.payload)
    part.ClearField("payload")
    return kind, frame, payload


def _decode_payload_first(message: bytes) -> tuple[str, Frame, memoryview] | None:
    kind = _KIND_OF_FIRST_BYTE.get(message[0]) if message else None
    if kind is None:
        return None
    at, ends = 0, set()
    for tag in _PATHS[kind]:
        if not message.startswith(tag, at):
            return None
        at += len(tag)
        size = shift = 0
        while at < len(message) and shift < 35:
            byte = message[at]
            at += 1
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        ends.add(at + size)
    end = ends.pop()
    # Levels that end in different places have other fields behind the payload.
    if ends or end > len(message):
        return None
    frame = _parse(message[end:])
    if frame.WhichOneof("kind") != kind or body(frame, kind).payload:
        return None
    return kind, frame, memoryview(message)[at:end]


def _parse(message: bytes) -> Frame:
    try:
        return Frame.FromString(message)
    except DecodeError as error:
        raise CallError(f"not a frame: {error}") from error
