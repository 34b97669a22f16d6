"""Functions that need no cluster: versions, and checks of models and specs."""

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
    """Return the versions of Python, Moesaic and its main dependencies that are installed."""
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
    """Describe a model's experts and their sizes in the pool.

    ``model`` is a folder, a hub id, or ``demo``. Raises CheckpointError and UnsupportedModel.
    """
    import torch

    from .models.source import resolve_model
    from .models.trunk.describe import describe

    return describe(resolve_model(model), getattr(torch, dtype))


def check_model(
    model: str, dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
) -> CheckedModel:
    """Do `inspect_model`, and find all errors in the model's folder.

    Tensors, tokenizer and chat template are checked. Raises CheckpointError if there is no such
    model.
    """
    with _uncollected():
        import torch

        from .actors.preflight.check_model import check_model as check
        from .models.source import resolve_model

        # Only an endpoint needs a tokenizer; a pool, a router service and the SDK do not.
        return check(resolve_model(model), getattr(torch, dtype), key="model", tokenizer="warning")


def check_spec(spec: Spec) -> list[Finding]:
    """Find what would keep `up` from starting ``spec``, as far as it can be known before.

    The findings include warnings, and what could not be checked.
    """
    with _uncollected():
        from .actors.preflight.preflight import preflight

        return preflight(spec).findings


@contextmanager
def _uncollected() -> Iterator[None]:
    """Switch garbage collection off.

    Importing torch and transformers and reading the names of all tensors make millions of objects
    and no garbage; collections took a quarter of the time (measured).
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
