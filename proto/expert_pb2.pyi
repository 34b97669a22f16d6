from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    FLOAT32: _ClassVar[DType]
    BFLOAT16: _ClassVar[DType]
    FLOAT16: _ClassVar[DType]
    FLOAT64: _ClassVar[DType]
DTYPE_UNSPECIFIED: DType
FLOAT32: DType
BFLOAT16: DType
FLOAT16: DType
FLOAT64: DType

class Frame(_message.Message):
    __slots__ = ("hello", "welcome", "call", "reply", "refusal", "cancel", "ping", "pong", "backward", "rendezvous", "lend")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FIELD_NUMBER: _ClassVar[int]
    RENDEZVOUS_FIELD_NUMBER: _ClassVar[int]
    LEND_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    welcome: Welcome
    call: Call
    reply: Reply
    refusal: Refusal
    cancel: Cancel
    ping: Ping
    pong: Pong
    backward: Backward
    rendezvous: Rendezvous
    lend: Lend
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., call: _Optional[_Union[Call, _Mapping]] = ..., reply: _Optional[_Union[Reply, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., pong: _Optional[_Union[Pong, _Mapping]] = ..., backward: _Optional[_Union[Backward, _Mapping]] = ..., rendezvous: _Optional[_Union[Rendezvous, _Mapping]] = ..., lend: _Optional[_Union[Lend, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("wire_version", "router", "slots", "slot_bytes", "group", "device_memory", "proof", "borrows")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MEMORY_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    BORROWS_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    router: str
    slots: int
    slot_bytes: int
    group: str
    device_memory: DeviceMemory
    proof: bytes
    borrows: bool
    def __init__(self, wire_version: _Optional[int] = ..., router: _Optional[str] = ..., slots: _Optional[int] = ..., slot_bytes: _Optional[int] = ..., group: _Optional[str] = ..., device_memory: _Optional[_Union[DeviceMemory, _Mapping]] = ..., proof: _Optional[bytes] = ..., borrows: _Optional[bool] = ...) -> None: ...

class Lend(_message.Message):
    __slots__ = ("model", "chunks")
    class Chunk(_message.Message):
        __slots__ = ("number", "serial")
        NUMBER_FIELD_NUMBER: _ClassVar[int]
        SERIAL_FIELD_NUMBER: _ClassVar[int]
        number: int
        serial: int
        def __init__(self, number: _Optional[int] = ..., serial: _Optional[int] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    model: str
    chunks: _containers.RepeatedCompositeFieldContainer[Lend.Chunk]
    def __init__(self, model: _Optional[str] = ..., chunks: _Optional[_Iterable[_Union[Lend.Chunk, _Mapping]]] = ...) -> None: ...

class DeviceMemory(_message.Message):
    __slots__ = ("device", "handle", "offset", "counter_handle", "counter_offset", "event_handle", "event_needed")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    COUNTER_HANDLE_FIELD_NUMBER: _ClassVar[int]
    COUNTER_OFFSET_FIELD_NUMBER: _ClassVar[int]
    EVENT_HANDLE_FIELD_NUMBER: _ClassVar[int]
    EVENT_NEEDED_FIELD_NUMBER: _ClassVar[int]
    device: str
    handle: bytes
    offset: int
    counter_handle: bytes
    counter_offset: int
    event_handle: bytes
    event_needed: bool
    def __init__(self, device: _Optional[str] = ..., handle: _Optional[bytes] = ..., offset: _Optional[int] = ..., counter_handle: _Optional[bytes] = ..., counter_offset: _Optional[int] = ..., event_handle: _Optional[bytes] = ..., event_needed: _Optional[bool] = ...) -> None: ...

class Rendezvous(_message.Message):
    __slots__ = ("store_address",)
    STORE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    store_address: str
    def __init__(self, store_address: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("wire_version", "host", "incarnation", "max_rows")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    host: str
    incarnation: int
    max_rows: int
    def __init__(self, wire_version: _Optional[int] = ..., host: _Optional[str] = ..., incarnation: _Optional[int] = ..., max_rows: _Optional[int] = ...) -> None: ...

class ExpertVersion(_message.Message):
    __slots__ = ("expert", "version")
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    expert: int
    version: int
    def __init__(self, expert: _Optional[int] = ..., version: _Optional[int] = ...) -> None: ...

class Trace(_message.Message):
    __slots__ = ("trace_ids", "span_id")
    TRACE_IDS_FIELD_NUMBER: _ClassVar[int]
    SPAN_ID_FIELD_NUMBER: _ClassVar[int]
    trace_ids: _containers.RepeatedScalarFieldContainer[bytes]
    span_id: bytes
    def __init__(self, trace_ids: _Optional[_Iterable[bytes]] = ..., span_id: _Optional[bytes] = ...) -> None: ...

class Call(_message.Message):
    __slots__ = ("seq", "model", "layer", "term", "epoch", "incarnation", "timeout_us", "rows", "hidden", "top_k", "dtype", "exact", "slot", "version", "other_versions", "payload_bytes", "payload", "more", "checksum", "attempt", "step", "keep", "trace")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_US_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OTHER_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    seq: int
    model: str
    layer: int
    term: int
    epoch: int
    incarnation: int
    timeout_us: int
    rows: int
    hidden: int
    top_k: int
    dtype: DType
    exact: bool
    slot: int
    version: int
    other_versions: _containers.RepeatedCompositeFieldContainer[ExpertVersion]
    payload_bytes: int
    payload: bytes
    more: bool
    checksum: int
    attempt: int
    step: int
    keep: bool
    trace: Trace
    def __init__(self, seq: _Optional[int] = ..., model: _Optional[str] = ..., layer: _Optional[int] = ..., term: _Optional[int] = ..., epoch: _Optional[int] = ..., incarnation: _Optional[int] = ..., timeout_us: _Optional[int] = ..., rows: _Optional[int] = ..., hidden: _Optional[int] = ..., top_k: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ..., exact: _Optional[bool] = ..., slot: _Optional[int] = ..., version: _Optional[int] = ..., other_versions: _Optional[_Iterable[_Union[ExpertVersion, _Mapping]]] = ..., payload_bytes: _Optional[int] = ..., payload: _Optional[bytes] = ..., more: _Optional[bool] = ..., checksum: _Optional[int] = ..., attempt: _Optional[int] = ..., step: _Optional[int] = ..., keep: _Optional[bool] = ..., trace: _Optional[_Union[Trace, _Mapping]] = ...) -> None: ...

class Backward(_message.Message):
    __slots__ = ("call", "step", "microbatch", "attempt", "run", "part", "worker")
    CALL_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    call: Call
    step: int
    microbatch: int
    attempt: int
    run: int
    part: int
    worker: int
    def __init__(self, call: _Optional[_Union[Call, _Mapping]] = ..., step: _Optional[int] = ..., microbatch: _Optional[int] = ..., attempt: _Optional[int] = ..., run: _Optional[int] = ..., part: _Optional[int] = ..., worker: _Optional[int] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("seq", "incarnation", "payload_bytes", "payload", "more", "bad_experts", "queued_us", "busy_us", "checksum", "batch_us", "version", "other_versions")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    BAD_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_US_FIELD_NUMBER: _ClassVar[int]
    BUSY_US_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    BATCH_US_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OTHER_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    seq: int
    incarnation: int
    payload_bytes: int
    payload: bytes
    more: bool
    bad_experts: _containers.RepeatedScalarFieldContainer[int]
    queued_us: int
    busy_us: int
    checksum: int
    batch_us: int
    version: int
    other_versions: _containers.RepeatedCompositeFieldContainer[ExpertVersion]
    def __init__(self, seq: _Optional[int] = ..., incarnation: _Optional[int] = ..., payload_bytes: _Optional[int] = ..., payload: _Optional[bytes] = ..., more: _Optional[bool] = ..., bad_experts: _Optional[_Iterable[int]] = ..., queued_us: _Optional[int] = ..., busy_us: _Optional[int] = ..., checksum: _Optional[int] = ..., batch_us: _Optional[int] = ..., version: _Optional[int] = ..., other_versions: _Optional[_Iterable[_Union[ExpertVersion, _Mapping]]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("seq", "incarnation", "code", "message")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    seq: int
    incarnation: int
    code: str
    message: str
    def __init__(self, seq: _Optional[int] = ..., incarnation: _Optional[int] = ..., code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("seq",)
    SEQ_FIELD_NUMBER: _ClassVar[int]
    seq: int
    def __init__(self, seq: _Optional[int] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ("seq",)
    SEQ_FIELD_NUMBER: _ClassVar[int]
    seq: int
    def __init__(self, seq: _Optional[int] = ...) -> None: ...

class Pong(_message.Message):
    __slots__ = ("seq", "incarnation")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    seq: int
    incarnation: int
    def __init__(self, seq: _Optional[int] = ..., incarnation: _Optional[int] = ...) -> None: ...

class WeightsKey(_message.Message):
    __slots__ = ("model", "layer", "expert", "version", "kind", "run", "attempt", "source")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        EXPERT: _ClassVar[WeightsKey.Kind]
        WEIGHTS: _ClassVar[WeightsKey.Kind]
        GRADIENT: _ClassVar[WeightsKey.Kind]
        STATE: _ClassVar[WeightsKey.Kind]
    EXPERT: WeightsKey.Kind
    WEIGHTS: WeightsKey.Kind
    GRADIENT: WeightsKey.Kind
    STATE: WeightsKey.Kind
    class Attempt(_message.Message):
        __slots__ = ("run", "step", "number")
        RUN_FIELD_NUMBER: _ClassVar[int]
        STEP_FIELD_NUMBER: _ClassVar[int]
        NUMBER_FIELD_NUMBER: _ClassVar[int]
        run: int
        step: int
        number: int
        def __init__(self, run: _Optional[int] = ..., step: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    model: str
    layer: int
    expert: int
    version: int
    kind: WeightsKey.Kind
    run: int
    attempt: WeightsKey.Attempt
    source: str
    def __init__(self, model: _Optional[str] = ..., layer: _Optional[int] = ..., expert: _Optional[int] = ..., version: _Optional[int] = ..., kind: _Optional[_Union[WeightsKey.Kind, str]] = ..., run: _Optional[int] = ..., attempt: _Optional[_Union[WeightsKey.Attempt, _Mapping]] = ..., source: _Optional[str] = ...) -> None: ...

class WeightsChunk(_message.Message):
    __slots__ = ("key", "total_bytes", "checksum", "data")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    key: WeightsKey
    total_bytes: int
    checksum: int
    data: bytes
    def __init__(self, key: _Optional[_Union[WeightsKey, _Mapping]] = ..., total_bytes: _Optional[int] = ..., checksum: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Bulk(_message.Message):
    __slots__ = ("hello", "get", "put", "written", "too_small", "done", "refusal", "lend")
    class Hello(_message.Message):
        __slots__ = ("wire_version", "proof")
        WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
        PROOF_FIELD_NUMBER: _ClassVar[int]
        wire_version: int
        proof: bytes
        def __init__(self, wire_version: _Optional[int] = ..., proof: _Optional[bytes] = ...) -> None: ...
    class Get(_message.Message):
        __slots__ = ("seq", "key")
        SEQ_FIELD_NUMBER: _ClassVar[int]
        KEY_FIELD_NUMBER: _ClassVar[int]
        seq: int
        key: WeightsKey
        def __init__(self, seq: _Optional[int] = ..., key: _Optional[_Union[WeightsKey, _Mapping]] = ...) -> None: ...
    class Put(_message.Message):
        __slots__ = ("seq", "key", "total_bytes")
        SEQ_FIELD_NUMBER: _ClassVar[int]
        KEY_FIELD_NUMBER: _ClassVar[int]
        TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
        seq: int
        key: WeightsKey
        total_bytes: int
        def __init__(self, seq: _Optional[int] = ..., key: _Optional[_Union[WeightsKey, _Mapping]] = ..., total_bytes: _Optional[int] = ...) -> None: ...
    class Lend(_message.Message):
        __slots__ = ("seq", "gradients")
        SEQ_FIELD_NUMBER: _ClassVar[int]
        GRADIENTS_FIELD_NUMBER: _ClassVar[int]
        seq: int
        gradients: _containers.RepeatedCompositeFieldContainer[Bulk.Gradient]
        def __init__(self, seq: _Optional[int] = ..., gradients: _Optional[_Iterable[_Union[Bulk.Gradient, _Mapping]]] = ...) -> None: ...
    class Gradient(_message.Message):
        __slots__ = ("key", "tensors")
        KEY_FIELD_NUMBER: _ClassVar[int]
        TENSORS_FIELD_NUMBER: _ClassVar[int]
        key: WeightsKey
        tensors: _containers.RepeatedCompositeFieldContainer[Bulk.Tensor]
        def __init__(self, key: _Optional[_Union[WeightsKey, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[Bulk.Tensor, _Mapping]]] = ...) -> None: ...
    class Tensor(_message.Message):
        __slots__ = ("name", "dtype", "shape", "at")
        NAME_FIELD_NUMBER: _ClassVar[int]
        DTYPE_FIELD_NUMBER: _ClassVar[int]
        SHAPE_FIELD_NUMBER: _ClassVar[int]
        AT_FIELD_NUMBER: _ClassVar[int]
        name: str
        dtype: DType
        shape: _containers.RepeatedScalarFieldContainer[int]
        at: int
        def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., at: _Optional[int] = ...) -> None: ...
    class Written(_message.Message):
        __slots__ = ("seq", "bytes", "total_bytes", "checksum")
        SEQ_FIELD_NUMBER: _ClassVar[int]
        BYTES_FIELD_NUMBER: _ClassVar[int]
        TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
        CHECKSUM_FIELD_NUMBER: _ClassVar[int]
        seq: int
        bytes: int
        total_bytes: int
        checksum: int
        def __init__(self, seq: _Optional[int] = ..., bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...
    class TooSmall(_message.Message):
        __slots__ = ("seq", "total_bytes")
        SEQ_FIELD_NUMBER: _ClassVar[int]
        TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
        seq: int
        total_bytes: int
        def __init__(self, seq: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...
    class Done(_message.Message):
        __slots__ = ("seq",)
        SEQ_FIELD_NUMBER: _ClassVar[int]
        seq: int
        def __init__(self, seq: _Optional[int] = ...) -> None: ...
    HELLO_FIELD_NUMBER: _ClassVar[int]
    GET_FIELD_NUMBER: _ClassVar[int]
    PUT_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    TOO_SMALL_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    LEND_FIELD_NUMBER: _ClassVar[int]
    hello: Bulk.Hello
    get: Bulk.Get
    put: Bulk.Put
    written: Bulk.Written
    too_small: Bulk.TooSmall
    done: Bulk.Done
    refusal: Refusal
    lend: Bulk.Lend
    def __init__(self, hello: _Optional[_Union[Bulk.Hello, _Mapping]] = ..., get: _Optional[_Union[Bulk.Get, _Mapping]] = ..., put: _Optional[_Union[Bulk.Put, _Mapping]] = ..., written: _Optional[_Union[Bulk.Written, _Mapping]] = ..., too_small: _Optional[_Union[Bulk.TooSmall, _Mapping]] = ..., done: _Optional[_Union[Bulk.Done, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., lend: _Optional[_Union[Bulk.Lend, _Mapping]] = ...) -> None: ...

class PutWeightsResult(_message.Message):
    __slots__ = ("bytes",)
    BYTES_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    def __init__(self, bytes: _Optional[int] = ...) -> None: ...
