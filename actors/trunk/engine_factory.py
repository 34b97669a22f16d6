"""The function that makes a trunk's engine in the process of a replica."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...models.trunk.lean_imports import import_models
from ..engine.trunk_config import TrunkConfig

if TYPE_CHECKING:
    from ..engine.engine import Engine


@dataclass(frozen=True)
class EngineFactory:
    """Makes the engine of a trunk; picklable, and read without torch."""

    config: TrunkConfig

    def __call__(self) -> Engine:
        if self.config.engine_kind != "vllm":  # vLLM compiles
            import_models()
        from .trunk import open_engine

        return open_engine(self.config)
