"""The models that a router service computes, in the form that its clients see."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ...cluster.expert_keys import LayerKey
from ...cluster.placement import ModelRef, ModelShape
from ...kernels.ffn import ExpertForm
from ...models.trunk.config import config_from_dict, read_config, torch_dtype
from ...models.trunk.experts_layers import ExpertsLayer, experts_layers, forms_anywhere
from ...models.trunk.trunk import meta_model
from ...proto.errors import ClusterError, UnknownModel
from ...proto.expert_pb2 import DType
from ...proto.limits import MAX_TOP_K
from ...proto.router_pb2 import LayerInfo, ModelInfo
from ...proto.wire import DTYPE_TO_WIRE

log = logging.getLogger(__name__)

# Models can be added while a cluster runs (`Cluster.attach`). A request for an unknown model
# refreshes the catalog, but not more often than this.
LOOK_S = 1.0

Served = Iterable[tuple[ModelRef, ModelShape]]


class Catalog:
    """A cache of the served models; thread-safe."""

    def __init__(
        self,
        look: Callable[[], Served],
        clock: Callable[[], float] = time.monotonic,
        forms: dict[LayerKey, ExpertForm] | None = None,
    ) -> None:
        """Make an empty catalog; ``look`` returns all models, or raises ClusterError.

        ``forms`` gets the arithmetic of the layers that any process can compute.
        """
        self._look = look
        self._clock = clock
        self._lock = threading.Lock()
        self._models: dict[str, ModelInfo] = {}
        self._forms = {} if forms is None else forms
        self._looked_at = float("-inf")

    def all(self) -> list[ModelInfo]:
        """Return all models. Raises ClusterError if they could never be read so far."""
        with self._lock:
            self._refresh()
            return list(self._models.values())

    def find(self, model: str) -> ModelInfo:
        """Return a model by its name. Raises UnknownModel, and ClusterError like `all`."""
        # Without the lock, so that calls for known models do not wait for a refresh.
        if (found := self._models.get(model)) is not None:
            return found
        with self._lock:
            self._refresh()
            if model not in self._models:
                known = ", ".join(sorted(self._models)) or "no model"
                raise UnknownModel(
                    f"model: {model!r} is not served; the router service has {known}", param="model"
                )
            return self._models[model]

    def _refresh(self) -> None:
        if self._clock() < self._looked_at + LOOK_S:
            return
        try:
            found = list(self._look())
        except ClusterError as error:
            # The controller is restarting; the models that are known stay valid meanwhile.
            if self._looked_at == float("-inf"):
                raise
            log.info("the list of models stays as it is: %s", error)
        else:
            self._models = {
                ref.name: self._models.get(ref.name) or self._describe(ref, shape)
                for ref, shape in found
            }
        self._looked_at = self._clock()

    def _describe(self, ref: ModelRef, shape: ModelShape) -> ModelInfo:
        layers = layers_of(ref)
        for layer, form in forms_anywhere(layers).items():
            self._forms[LayerKey(ref.name, layer)] = form
        return describe_model(ref, shape, layers)


def layers_of(ref: ModelRef) -> list[ExpertsLayer]:
    """Return a model's layers without weights. Raises CheckpointError and UnsupportedModel."""
    config = read_config(Path(ref.path)) if ref.path else config_from_dict(dict(ref.config))
    return experts_layers(meta_model(config))


def describe_model(ref: ModelRef, shape: ModelShape, layers: Iterable[ExpertsLayer]) -> ModelInfo:
    """Describe a model's dtype and layers."""
    infos = [
        LayerInfo(
            layer=layer.layer,
            experts=layer.num_experts,
            hidden=layer.hidden_size,
            max_top_k=min(layer.num_experts, MAX_TOP_K),
        )
        for layer in layers
    ]
    dtype = DType.Name(DTYPE_TO_WIRE[torch_dtype(ref.dtype)])
    return ModelInfo(name=ref.name, dtype=dtype, exact=shape.exact, layers=infos)
