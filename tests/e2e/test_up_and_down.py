"""`moesaic up -d`, `status` and `down` in processes of their own, as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from moesaic import Client
from moesaic.actors.runtime.embedded_ray import processes_of
from moesaic.session import is_alive, session_dir
from tests.helpers.documented import json_keys
from tests.integration.conftest import save_model


@pytest.mark.alone
def test_what_is_printed_has_the_keys_of_the_page(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "mixtral")
    name = f"up{os.getpid()}"
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        yaml.safe_dump(
            {
                "name": name,
                "models": [{"name": "m", "path": str(folder)}],
                "hosts": [{"count": 1, "threads": 1}],
                "trunk": {"cache_tokens": 1024, "threads": 1},
                "endpoint": {"port": 0},
                "monitoring": {"port": 0},
            }
        )
    )

    def moesaic(*words: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "moesaic.cli.main", *words, "--json"],
            capture_output=True,
            text=True,
            timeout=110,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    up = moesaic("up", str(spec), "-d")
    try:
        assert set(up) == json_keys()["up"]
        with Client(up["url"]) as client:
            assert client.complete("the fox", max_tokens=3).usage.completion_tokens
        assert moesaic("status", "--name", name)["healthy"]
        session = json.loads((session_dir() / f"{name}.json").read_text())
        started = processes_of(Path(session["ray_folder"]).name)
        assert started
    finally:
        down = moesaic("down", "--name", name)
    assert set(down) == json_keys()["down"]
    assert not [process for process in started if is_alive(process)]
