"""Client libraries against the endpoint. They are installed in an environment of their own
(`make test-clients`), and the endpoint runs in the product's: only HTTP is between them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# In the product's environment there is nothing to collect here.
collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("litellm") is None else []

# Before the libraries are imported. None of them is to tell anybody that it is used.
os.environ.update(
    LITELLM_LOCAL_MODEL_COST_MAP="True",
    LITELLM_TELEMETRY="False",
    LANGCHAIN_TRACING_V2="false",
    LANGSMITH_TRACING="false",
    DO_NOT_TRACK="1",
)
for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "LANGSMITH_API_KEY"):
    os.environ.pop(name, None)

_LOOPBACK = ("127.0.0.1", "::1", "localhost", None)
START_S = 120.0


def _stay_here(event: str, args: tuple[Any, ...]) -> None:
    """Nothing here may leave the machine."""
    host: Any = None
    if event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
    elif event == "socket.getaddrinfo":
        host = args[0].decode() if isinstance(args[0], bytes) else args[0]
    if host not in _LOOPBACK:
        raise PermissionError(f"a client library asks for {host!r}; only loopback is allowed")


if not collect_ignore_glob:
    sys.addaudithook(_stay_here)


def _product() -> str:
    """The Python of the environment that the endpoint runs in."""
    return os.environ.get("MOESAIC_PYTHON", str(ROOT / ".venv" / "bin" / "python"))


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """The address of an endpoint over small scripted models."""
    process = subprocess.Popen(
        [_product(), "-m", "tests.with_clients.server"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        try:
            process.wait(START_S)
        finally:
            process.kill()
            process.stdout.close()


@pytest.fixture(scope="session")
def demo_url() -> Iterator[str]:
    """The address of a cluster that serves the demo model."""
    cluster = f"clients-{uuid.uuid4().hex[:8]}"
    environment = {**os.environ, "MOESAIC__NAME": cluster, "MOESAIC__ENDPOINT__PORT": "0"}

    def moesaic(*words: str) -> Any:
        done = subprocess.run(
            [_product(), "-m", "moesaic.cli.main", *words, "--json"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    up = moesaic("up", "deploy/local.yaml", "-d")
    try:
        yield up["url"]
    finally:
        moesaic("down", "--name", cluster)
