"""What a process loads: only what it needs, seen in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

PROBE = """
import importlib, sys
importlib.import_module(sys.argv[1])
print(sorted(name for name in sys.argv[2:] if name in sys.modules))
"""
HEAVY = ("ray", "torch", "transformers", "scipy", "grpc", "fastapi", "vllm")


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("moesaic", (*HEAVY, "numpy", "pydantic", "httpx", "safetensors")),
        ("moesaic.cli.main", (*HEAVY, "numpy", "pydantic", "httpx", "safetensors")),
        ("moesaic.clients.http_client", (*HEAVY, "numpy", "pydantic")),
        (
            "moesaic.cluster.spec.spec",
            (*HEAVY, "moesaic.cluster.control.control", "moesaic.cluster.planner.planner"),
        ),
        ("moesaic.cluster.host.residency", (*HEAVY, "pydantic")),
        # Restarted while calls run: the sooner it is back, the better.
        (
            "moesaic.actors.controller.controller",
            ("torch", "transformers", "fastapi", "starlette", "vllm", "safetensors", "ray.serve"),
        ),
        # Read in a trunk's new process before it imports transformers without compilers.
        ("moesaic.actors.trunk.engine_factory", ("torch", "transformers", "fastapi", "vllm")),
        ("moesaic.actors.host.host_actor", ("torch", "transformers", "fastapi", "vllm")),
        ("moesaic.actors.endpoint.ingress", ("vllm", "transformers.generation.utils")),
    ],
)
def test_an_import_loads_none_of(module: str, absent: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, module, *absent],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
