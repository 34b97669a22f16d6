"""Bad input over spec, HTTP, wire and files: one clear error each, and the service goes on."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.actors.router.connect import connect
from moesaic.actors.transport.grpc.weights import get_weights, put_weights
from moesaic.cluster.expert_keys import ExpertKey, ExpertVersion
from moesaic.cluster.placement import ModelRef, ModelShape
from moesaic.cluster.routing.transports import Transport
from moesaic.cluster.spec.spec import load_spec, parse_spec
from moesaic.models.folder.files import INDEX_FILE, SINGLE_FILE
from moesaic.proto.errors import (
    ERRORS,
    BodyTooLarge,
    CallError,
    CheckpointError,
    Corrupted,
    Expired,
    Forbidden,
    HostLost,
    MoesaicError,
    NotHere,
    RequestError,
    SpecError,
    UnknownModel,
    UnsupportedModel,
    from_wire,
)
from moesaic.proto.expert_pb2 import BFLOAT16, FLOAT32, Frame
from moesaic.proto.keys import secret_of_process
from moesaic.proto.wire import CallLayout
from tests.helpers.pool.host_calls import KEY, LAYER, ask
from tests.helpers.pool.pools import granted
from tests.helpers.pool.served_pool import MAX_BODY, ServedPool
from tests.helpers.pool.transports import hear, hear_end

Act = Callable[[ServedPool], object]

# ---- spec ---------------------------------------------------------------------------------------


def spec(**values: Any) -> Act:
    return lambda served: parse_spec(values)


def spec_file(content: bytes) -> Act:
    def act(served: ServedPool) -> None:
        file = served.folder / "spec.yaml"
        file.write_bytes(content)
        load_spec(file)

    return act


# ---- HTTP ---------------------------------------------------------------------------------------


def http(body: Any, path: str = "completions") -> Act:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    def act(served: ServedPool) -> None:
        response = served.http.post(f"/v1/{path}", content=content)
        if response.status_code != 200:
            error = response.json()["error"]
            assert response.status_code == ERRORS[error["code"]].http_status
            raise from_wire(error["code"], error["message"])

    return act


ASKED = {"model": "m", "prompt": [5, 6], "max_tokens": 2}


# ---- wire ---------------------------------------------------------------------------------------


def wire(transport: Transport = "shm", **fields: Any) -> Act:
    return lambda served: ask(served, transport, **fields)


def other_experts(served: ServedPool) -> tuple[int, int]:
    """Two experts that the first host does not hold."""
    first, second, *_ = sorted(served.hosts[1].report().holdings[KEY])
    return first, second


def garbage(served: ServedPool) -> None:
    """A datagram that is no frame, where a router's Hello should be."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(10)
        sock.connect("\0" + served.hosts[0].entry().shm_address)
        sock.send(b"\xff" * 100)
        if sock.recv(1) == b"":
            raise HostLost("the host closed the connection")


def no_frame_for_hosts(served: ServedPool) -> None:
    channel = connect(served.hosts[0].entry(), "shm", router="bad", slots=1)
    with closing(channel):
        hear(channel)
        frame = Frame()
        frame.pong.seq = 3
        channel.send(frame)
        raise hear_end(channel)


def backward(served: ServedPool) -> None:
    """A backward call of an attempt that has not begun."""
    channel = connect(served.hosts[0].entry(), "shm", router="bad", slots=1)
    with closing(channel):
        hear(channel)
        frame = Frame()
        call = frame.backward.call
        call.seq, call.rows, call.hidden, call.top_k, call.dtype = 9, 1, 32, 1, FLOAT32
        layout = CallLayout.of(1, 32, 1, torch.float32, False, backward=True)
        call.payload_bytes = layout.call_bytes
        channel.send_call(frame, layout, lambda buffer: None)
        refusal = hear(channel)[0].frame.refusal
        assert refusal.seq == 9
        raise from_wire(refusal.code, refusal.message)


# ---- weights ------------------------------------------------------------------------------------


def put(model: str = "m", layer: int = LAYER, expert: int = 1, **changed: Tensor | None) -> Act:
    """Put an expert over its channel, with some of its tensors changed or left out."""

    def act(served: ServedPool) -> None:
        host = served.holder(ExpertKey("m", LAYER, 1))
        tensors = host._store.get(ExpertVersion(ExpertKey("m", LAYER, 1), 1)) | changed
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        key = ExpertKey(model, layer, expert)
        proof = secret_of_process().proof("weights", host.entry().target)
        put_weights(
            host.entry().grpc_address,
            ExpertVersion(key, 1),
            kept,
            timeout_s=10,
            grant=granted(host, key),
            proof=proof,
        )

    return act


def get(model: str = "m", layer: int = LAYER, expert: int = 1) -> Act:
    def act(served: ServedPool) -> None:
        entry = served.hosts[0].entry()
        proof = secret_of_process().proof("weights", entry.target)
        key = ExpertKey(model, layer, expert)
        get_weights(
            entry.grpc_address, ExpertVersion(key, 1), timeout_s=10, max_bytes=1 << 20, proof=proof
        )

    return act


# ---- files --------------------------------------------------------------------------------------


def load(damage: Callable[[Path], object], expert: int = 3, layer: int = LAYER) -> Act:
    """Let a host of the running pool load an expert of a damaged copy of the model."""

    def act(served: ServedPool) -> None:
        # A host keeps what it knows of a folder.
        folder = served.folder.parent / f"damaged-{id(act)}"
        shutil.copytree(served.folder, folder)
        damage(folder)
        ref = ModelRef(name="bad", dtype="float32", path=str(folder))
        shape = ModelShape(model="bad", experts={LAYER: 8})
        served.hosts[0].load([(ref, shape)], [ExpertVersion(ExpertKey("bad", layer, expert), 1)])

    return act


def truncate(folder: Path) -> None:
    file = folder / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-1000])


def without_expert(folder: Path) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    kept = {name: tensor for name, tensor in tensors.items() if "experts.3." not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / SINGLE_FILE)


def escaping(folder: Path) -> None:
    content = json.dumps({"weight_map": {"a": "../x.safetensors"}})
    (folder / INDEX_FILE).write_text(content)


def pickled(folder: Path) -> None:
    (folder / SINGLE_FILE).rename(folder / "pytorch_model.bin")


def config(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(text)


def nothing(folder: Path) -> None:
    return None


# ---- the table ----------------------------------------------------------------------------------

CASES: list[tuple[str, Act, type[MoesaicError], str]] = [
    # name, what is done, the error, what it says
    ("spec-key", spec(models=[], colour=1), SpecError, "colour: unknown key (got 1)"),
    ("spec-value", spec(hosts=[{"count": -1}]), SpecError, "hosts.0.count: Input should be gr"),
    ("spec-name", spec(models=[{"name": "../m", "path": "p"}]), SpecError, "models.0.name: "),
    ("spec-yaml", spec_file(b"hosts: ["), SpecError, "spec.yaml: not YAML"),
    ("spec-binary", spec_file(b"\x93NUMPY\xff"), SpecError, "spec.yaml: cannot be read"),
    ("http-json", http(b'{"model": "m", '), RequestError, "not valid JSON"),
    ("http-model", http(ASKED | {"model": "n"}), UnknownModel, "'n' does not exist; use one of: m"),
    ("http-path", http(ASKED | {"model": "../../etc/passwd"}), UnknownModel, "'../../etc/passwd'"),
    ("http-field", http(ASKED | {"colour": 1}), RequestError, "unknown parameter 'colour'"),
    ("http-type", http(ASKED | {"max_tokens": "2"}), RequestError, "max_tokens: input should be"),
    (
        "http-prompt",
        http(ASKED | {"prompt": [5] * 3000}),
        RequestError,
        "has 3000 tokens; at most 255",
    ),
    ("http-id", http(ASKED | {"prompt": [5, 320]}), RequestError, "token id 320"),
    ("http-negative", http(ASKED | {"prompt": [-1]}), RequestError, "token id -1"),
    ("http-empty", http(ASKED | {"prompt": []}), RequestError, "prompt: must be a string, a list"),
    ("http-nan", http(b'{"model": "m", "temperature": NaN}'), RequestError, "not valid JSON"),
    ("http-large", http(b" " * (MAX_BODY + 1)), BodyTooLarge, f"{MAX_BODY} are allowed"),
    ("http-chat", http(ASKED, "chat/completions"), RequestError, "missing parameter 'messages'"),
    ("wire-dtype", wire(dtype=BFLOAT16), CallError, "dtype: bfloat16, but 'm' is held as float32"),
    ("wire-dtype-99", wire(dtype=99), CallError, "dtype: 99 is not one of FLOAT32"),
    ("wire-hidden", wire(hidden=33), CallError, "hidden: 33, but 'm' has 32"),
    ("wire-hidden-grpc", wire("grpc", hidden=33), CallError, "hidden: 33, but 'm' has 32"),
    ("wire-no-rows", wire(rows=0), CallError, "rows: 0 is not between 1 and"),
    ("wire-no-assignments", wire(top_k=0), CallError, "top_k: 0 is not between 1 and"),
    ("wire-many-rows", wire(rows=513), CallError, "rows: 513 exceed this host's 512"),
    ("wire-oversized", wire(rows=2**24, payload_bytes=64), CallError, "rows: 16777216 x"),
    ("wire-short", wire(payload_bytes=64), CallError, "payload_bytes: 64, but 2 rows x 32"),
    ("wire-model", wire(model="../../m"), NotHere, "no expert of layer 1 of '../../m'"),
    ("wire-layer", wire(layer=77), NotHere, "no expert of layer 77 of 'm'"),
    ("wire-id", wire(ids=(1, 8)), CallError, "ids: expert 8 does not exist; layer 1 of 'm' has 8"),
    ("wire-negative-id", wire(ids=(1, -2)), CallError, "ids: expert -2 does not exist; layer 1"),
    ("wire-id-grpc", wire("grpc", ids=(1, 2**31 - 1)), CallError, "ids: expert 2147483647 does"),
    ("wire-elsewhere", lambda s: ask(s, "shm", ids=other_experts(s)), NotHere, "is not on this h"),
    ("wire-incarnation", wire(incarnation=3), NotHere, "incarnation: the call is for 3, this host"),
    (
        "wire-version",
        wire(version=2),
        NotHere,
        "version 2 of expert 1 of layer 1 of m is not on this host; it has version 1",
    ),
    ("wire-expired", wire(timeout_us=0), Expired, "call 1: its deadline passed before it arrived"),
    ("wire-expired-grpc", wire("grpc", timeout_us=1), Expired, "call 1: "),
    ("wire-checksum", wire(checksum=1), Corrupted, "call 1: its tensors do not match its checksum"),
    ("wire-checksum-grpc", wire("grpc", checksum=1), Corrupted, "call 1: its tensors"),
    ("wire-seq", wire(times=2), CallError, "seq: call 1 is in progress already"),
    ("wire-backward", backward, NotHere, "attempt 0 at step 0 of run 0: none has begun here"),
    ("wire-garbage", garbage, HostLost, "closed"),
    ("wire-kind", no_frame_for_hosts, HostLost, "closed"),
    ("put-shape", put(down=torch.zeros(32, 47)), CallError, "'down': (32, 47)"),
    ("put-missing", put(down=None), CallError, "its model takes"),
    ("put-dtype", put(up=torch.zeros(96, 32).half()), CallError, "up is torch.float16"),
    ("put-nan", put(up=torch.full((96, 32), torch.nan)), CallError, "up has values that are not f"),
    ("put-other", put(up=torch.zeros(96, 32)), Forbidden, "serves other tensors under this name"),
    ("put-large", put(up=torch.zeros(960, 320)), CallError, "total_bytes: 1"),
    ("put-expert", put(expert=8), CallError, "expert: 8 is not in layer 1 of 'm', which has 8"),
    ("put-expert-99", put(expert=99), CallError, "expert: 99 is not in layer 1 of 'm'"),
    ("put-layer", put(layer=77), CallError, "layer: 'm' has no experts in layer 77"),
    ("put-model", put(model="n"), NotHere, "model 'n' is unknown to this host"),
    ("get-expert", get(expert=99), CallError, "expert: 99 is not in layer 1 of 'm'"),
    ("get-shared", get(layer=77, expert=2**32 - 1), CallError, "no experts in layer 77"),
    ("get-model", get(model="../m"), NotHere, "model '../m' is unknown to this host"),
    ("file-truncated", load(truncate), CheckpointError, "model.safetensors: damaged or truncated"),
    (
        "file-no-expert",
        load(without_expert),
        CheckpointError,
        "lacks model.layers.0.block_sparse_moe.experts.3",
    ),
    ("file-path", load(escaping), CheckpointError, "weight_map names '../x.safetensors'"),
    ("file-pickle", load(pickled), CheckpointError, "only safetensors are read"),
    ("file-config", load(config("{")), CheckpointError, "config.json"),
    ("file-dense", load(config('{"model_type": "llama"}')), UnsupportedModel, "experts interface"),
    ("file-gone", load(shutil.rmtree), CheckpointError, "no config.json"),
    ("file-expert", load(nothing, expert=99), CallError, "expert: 99 is not in layer 1 of 'bad'"),
    ("file-layer", load(nothing, layer=77), CallError, "'bad' has no experts in layer 77"),
]


@pytest.mark.parametrize(
    ("act", "error", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_bad_input_gets_its_own_error(
    served: ServedPool, act: Act, error: type[MoesaicError], words: str
) -> None:
    with pytest.raises(error, match=re.escape(words)) as raised:
        act(served)
    assert type(raised.value) is error


def test_a_good_call_on_the_same_path_is_answered(served: ServedPool) -> None:
    """Else the table above would show nothing."""
    for transport in ("shm", "grpc"):
        reply, y_TH = ask(served, transport)
        assert y_TH.isfinite().all()
        assert y_TH.any()
        assert not reply.bad_experts
    put()(served)
    get()(served)
    load(nothing)(served)
    served.hosts[0].release([ExpertVersion(ExpertKey("bad", LAYER, 3), 1)])
