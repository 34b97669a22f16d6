from moesaic.proto import expert_pb2 as _expert_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ComputeHead(_message.Message):
    __slots__ = ("model", "layer", "rows", "hidden", "top_k", "dtype", "crc32")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    model: str
    layer: int
    rows: int
    hidden: int
    top_k: int
    dtype: _expert_pb2.DType
    crc32: int
    def __init__(self, model: _Optional[str] = ..., layer: _Optional[int] = ..., rows: _Optional[int] = ..., hidden: _Optional[int] = ..., top_k: _Optional[int] = ..., dtype: _Optional[_Union[_expert_pb2.DType, str]] = ..., crc32: _Optional[int] = ...) -> None: ...

class ComputeRequest(_message.Message):
    __slots__ = ("head", "data")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    head: ComputeHead
    data: bytes
    def __init__(self, head: _Optional[_Union[ComputeHead, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class ComputeReply(_message.Message):
    __slots__ = ("crc32", "data")
    CRC32_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    crc32: int
    data: bytes
    def __init__(self, crc32: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class ModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LayerInfo(_message.Message):
    __slots__ = ("layer", "experts", "hidden", "max_top_k")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    MAX_TOP_K_FIELD_NUMBER: _ClassVar[int]
    layer: int
    experts: int
    hidden: int
    max_top_k: int
    def __init__(self, layer: _Optional[int] = ..., experts: _Optional[int] = ..., hidden: _Optional[int] = ..., max_top_k: _Optional[int] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "dtype", "exact", "layers")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: _expert_pb2.DType
    exact: bool
    layers: _containers.RepeatedCompositeFieldContainer[LayerInfo]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[_expert_pb2.DType, str]] = ..., exact: _Optional[bool] = ..., layers: _Optional[_Iterable[_Union[LayerInfo, _Mapping]]] = ...) -> None: ...

class ModelsReply(_message.Message):
    __slots__ = ("models", "max_call_bytes")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    MAX_CALL_BYTES_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    max_call_bytes: int
    def __init__(self, models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ..., max_call_bytes: _Optional[int] = ...) -> None: ...
