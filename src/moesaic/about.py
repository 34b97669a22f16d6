"""What needs no cluster: versions, and what a model needs."""

from __future__ import annotations

import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .actors.preflight.check_model import CheckedModel
    from .actors.preflight.findings import Finding
    from .cluster.spec.spec import Spec
    from .models.trunk.describe import Described

_PACKAGES = ("moesaic", "ray", "torch", "transformers", "vllm", "grpcio", "protobuf")


def versions() -> dict[str, str]:
    """Of Python, of Moesaic and of what it runs on, as far as it is installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # vLLM is optional
    return found


def inspect_model(
    model: str, dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
) -> Described:
    """A model's experts and their sizes in the pool; ``model`` is a folder, a hub id, or ``demo``.
    Raises CheckpointError and UnsupportedModel."""
    import torch

    from .models.source import resolve_model
    from .models.trunk.describe import describe

    return describe(resolve_model(model), getattr(torch, dtype))


def check_model(
    model: str, dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
) -> CheckedModel:
    """`inspect_model`, and all that is wrong with its folder: tensors, tokenizer, chat template.

    Raises CheckpointError where there is no such model.
    """
    with _uncollected():
        import torch

        from .actors.preflight.check_model import check_model as check
        from .models.source import resolve_model

        # Without a tokenizer an endpoint cannot serve it; a pool, a router service and the SDK do.
        return check(resolve_model(model), getattr(torch, dtype), key="model", tokenizer="warning")


def check_spec(spec: Spec) -> list[Finding]:
    """All that would keep `up` from starting ``spec``, as far as it can be known before; also what
    is odd, and what could not be checked."""
    with _uncollected():
        from .actors.preflight.preflight import preflight

        return preflight(spec).findings


@contextmanager
def _uncollected() -> Iterator[None]:
    """Importing torch and transformers, and the names of all tensors, make millions of objects and
    no garbage: looking for it again and again took a quarter of the time (measured)."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
