"""A cluster of real Ray actors, shared by the tests of a module."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import moesaic
from moesaic.handle import Cluster
from tests.helpers.effort import LENDING
from tests.helpers.models.architectures import tiny_model
from tests.helpers.models.tiny import tiny_tokenizer
from tests.helpers.processes.leftovers import leaving_nothing

# Served by the shared cluster; `org/once` has one replica, the others two.
SERVED: dict[str, dict[str, Any]] = {
    "mixtral": {"num_experts_per_tok": 4},
    "gpt_oss": {},
    "org/once": {},
}
# Whose pages may use its endpoint.
PAGE = "https://chat.example"


def save_model(folder: Path, architecture: str, **overrides: Any) -> Path:
    """A tiny model with a tokenizer and a chat template, as a user has it."""
    model = tiny_model(architecture, vocab_size=320, max_position_embeddings=512, **overrides)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def one_kernel_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cannot run in two threads at once, as hosts and routers do here."""
    from moesaic.kernels.grouped import backward, ffn  # Triton is not needed elsewhere

    lock = threading.Lock()

    def locked(run: Callable[..., Any]) -> Callable[..., Any]:
        def run_alone(*given: Any, **options: Any) -> Any:
            with lock:
                return run(*given, **options)

        return run_alone

    for place, name in (
        (ffn, "grouped_ffn"),
        (ffn, "exact_rows"),
        (backward, "grouped_backward"),
        (backward.PendingSlotGradients, "accumulate"),
    ):
        monkeypatch.setattr(place, name, locked(getattr(place, name)))


@pytest.fixture(scope="module")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: save_model(root / name, "mixtral" if name == "org/once" else name, **overrides)
        for name, overrides in SERVED.items()
    }


@pytest.fixture(scope="module")
def cluster(model_folders: dict[str, Path]) -> Iterator[Cluster]:
    spec = {
        "name": f"test-{os.getpid()}",
        "models": [
            {
                "name": name,
                "path": str(path),
                "replicas": 1 if name == "org/once" else 2,
                "aliases": ["team/alias"] if name == "org/once" else [],
            }
            for name, path in model_folders.items()
        ],
        "hosts": [{"count": 3}],
        "network": {"lending": LENDING},
        "trunk": {"cache_tokens": 2048, "max_batch_tokens": 128, "threads": 1},
        "endpoint": {"port": 0, "cors_origins": [PAGE]},
        "monitoring": {"port": 0},
        "router": {"port": 0},
        "timeouts": {"expert_s": 30.0, "attempt_s": 1.0},
    }
    with leaving_nothing(), moesaic.up(spec) as running:
        yield running
