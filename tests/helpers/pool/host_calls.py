"""Single calls to a host of a served pool, with whatever a test writes into their frames."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from moesaic.actors.router.connect import connect
from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.routing.transports import Transport
from moesaic.proto.errors import from_wire
from moesaic.proto.expert_pb2 import FLOAT32, Frame, Reply
from moesaic.proto.wire import DTYPE_FROM_WIRE, CallLayout, checksum
from tests.helpers.pool.served_pool import ServedPool, held
from tests.helpers.pool.transports import hear

HIDDEN, LAYER = 32, 1
KEY = LayerKey("m", LAYER)
PROMPT = [5, 6, 7]


def ask(
    served: ServedPool,
    transport: Transport,
    *,
    ids: tuple[int, int] | None = None,
    x_TH: Tensor | None = None,
    times: int = 1,
    **fields: Any,
) -> tuple[Reply, Tensor]:
    """One call of two rows to the first host, with these fields of its frame set otherwise.

    Raises what the host refuses it with, or HostLost.
    """
    host = served.hosts[0]
    held_here = sorted(host.report().holdings[KEY])
    chosen = ids or (held_here[0], held_here[1])
    frame = Frame()
    call = frame.call
    call.seq, call.model, call.layer, call.dtype = 1, "m", LAYER, FLOAT32
    call.incarnation, call.timeout_us = host.incarnation, 10_000_000
    call.version = 1
    call.rows, call.hidden, call.top_k = 2, HIDDEN, 2
    for name in ("rows", "hidden", "top_k", "dtype", "exact"):
        if name in fields:
            setattr(call, name, fields.pop(name))
    dtype = DTYPE_FROM_WIRE.get(call.dtype, torch.float32)
    announced = CallLayout.of(call.rows, call.hidden, call.top_k, dtype, call.exact)
    call.payload_bytes = announced.call_bytes
    if "trace" in fields:
        call.trace.CopyFrom(fields.pop("trace"))
    for name, value in fields.items():
        setattr(call, name, value)
    # What is announced may be absurd; what is written is small.
    layout = announced if announced.slot_bytes < 1 << 20 else CallLayout.of(2, 32, 2, dtype, False)

    def write(buffer: Tensor) -> None:
        if call.rows and call.top_k:
            x, ids_TK, weights_TK = layout.call_tensors(buffer)
            x.copy_(torch.ones(x.shape) if x_TH is None else x_TH)
            ids_TK.copy_(torch.tensor(chosen[: ids_TK.shape[1]], dtype=torch.int32))
            weights_TK.fill_(1.0)
        if "checksum" not in fields:
            call.checksum = checksum(call.seq, buffer[: call.payload_bytes])

    channel = connect(host.entry(), transport, router="bad", slots=4)
    with closing(channel):
        assert hear(channel)[0].frame.HasField("welcome")
        with held(host):
            for _ in range(times):
                channel.send_call(frame, layout, write)
        heard = hear(channel)[0]
        if heard.frame.HasField("refusal"):
            raise from_wire(heard.frame.refusal.code, heard.frame.refusal.message)
        assert heard.payload is not None
        return heard.frame.reply, layout.reply_tensor(heard.payload).clone()
