"""Functions that need no cluster: versions, and checks of models and specs."""

from __future__ import annotations

import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .actors.preflight.check_model import CheckedModel
    from .actors.preflight.findings import Finding
    from .actors.preflight.preflight import Preflight
    from .cluster.spec.spec import Spec
    from .models.trunk.describe import ModelDescription

_PACKAGES = ("moesaic", "ray", "torch", "transformers", "vllm", "grpcio", "protobuf")
# Of the free memory that a default spec may plan with: caches and other programs need some, too.
_PLANNED_PART = 0.7


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
) -> ModelDescription:
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
    """Describe a model as `inspect_model` does, and find all errors in its folder.

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
    return examine_spec(spec).findings


def examine_spec(spec: Spec) -> Preflight:
    """Check ``spec`` as `check_spec` does; return what is planned for this machine's cards, too."""
    with _uncollected():
        from .actors.preflight.preflight import preflight

        return preflight(spec)


def default_spec(model: str) -> Spec:
    """Make a spec that serves one model on this machine: two hosts on loopback, named ``local``.

    ``model`` is a folder, a hub id (which is downloaded), or ``demo``. Each expert has two replicas
    where the memory that is free holds them, so that the loss of one host loses no expert.
    Variables ``MOESAIC__...`` override values as they do in a spec's file. Raises CheckpointError,
    UnsupportedModel and SpecError.
    """
    from .cluster.spec.spec import with_environment

    replicas = 2
    if model != "demo":
        with _uncollected():
            found, free = inspect_model(model), _free_bytes()
        needed = 2 * found.experts_bytes + found.trunk_bytes
        if needed > _PLANNED_PART * free:
            replicas = 1
    path = Path(model).expanduser()
    values = {
        "name": "local",
        "models": [
            {
                "name": path.resolve().name if path.is_dir() else model,
                "path": model,
                "dtype": "bfloat16",
                "replicas": replicas,
            }
        ],
        "hosts": [{"count": 2, "device": "auto"}],
        "endpoint": {"host": "127.0.0.1", "port": 8000},
        "monitoring": {"host": "127.0.0.1", "port": 8002},
    }
    return with_environment(values, source=model)


def _free_bytes() -> int:
    """Return what is free of the memory in which ``device: auto`` puts hosts and trunks."""
    import psutil

    from .actors.runtime.devices import visible_cards

    for card in visible_cards()[:1]:
        return card.total_bytes if card.free_bytes is None else card.free_bytes
    return psutil.virtual_memory().available


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
