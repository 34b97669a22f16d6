"""`serve deploy` begins a cluster and changes it, and `moesaic` finds it without a session file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from moesaic import Client
from moesaic.actors.runtime.ports import free_port
from tests.helpers.paths import ROOT
from tests.helpers.processes.live import asking, text_of, wait_until
from tests.integration.conftest import save_model

pytestmark = [pytest.mark.alone, pytest.mark.timeout(600), pytest.mark.slow]

HOST, NAME, TOKENS = "127.0.0.1", "deployed", 16
BIN = Path(sys.executable).parent


class Head:
    """A Ray that `ray start` has started, with its dashboard's agent for `serve deploy`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        port, dashboard = free_port(HOST), free_port(HOST)
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / "src"),
            "MOESAIC_CACHE": str(folder / "cache"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0123456789abcdef" * 2,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
        }
        self.run(
            *("ray", "start", "--head", "--num-cpus=6", f"--node-ip-address={HOST}"),
            *(f"--port={port}", "--include-dashboard=true", f"--dashboard-port={dashboard}"),
            *("--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={folder / 'ray'}"),
        )
        self.environment |= {
            "RAY_ADDRESS": f"{HOST}:{port}",
            "RAY_DASHBOARD_ADDRESS": f"http://{HOST}:{dashboard}",
        }

    def run(self, *command: str, fails: bool = False) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=240
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout

    def end(self) -> None:
        here = str(self.folder / "ray")
        for process in psutil.process_iter():
            try:
                if here in " ".join(process.cmdline()):
                    process.kill()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    found = Head(Path("/tmp") / f"sd-{os.getpid()}")
    try:
        yield found
    finally:
        found.end()


def status_of(head: Head, app: str) -> str:
    applications = yaml.safe_load(head.run("serve", "status"))["applications"]
    return applications.get(app, {}).get("status", "gone")


def wait_running(head: Head, app: str) -> None:
    deadline = time.monotonic() + 200
    while (status := status_of(head, app)) != "RUNNING":
        assert status != "DEPLOY_FAILED", head.run("serve", "status")
        assert time.monotonic() < deadline, head.run("serve", "status")
        time.sleep(1.0)


def test_serve_deploys_changes_and_moesaic_ends(head: Head, tmp_path: Path) -> None:
    one = save_model(tmp_path / "one", "mixtral")
    two = save_model(tmp_path / "two", "qwen2_moe")
    port, app = free_port(HOST), f"moesaic-{NAME}"
    spec: dict[str, Any] = {
        "name": NAME,
        "models": [{"name": "m", "path": str(one)}],
        "hosts": [{"count": 2, "threads": 1, "num_cpus": 0.1}],
        "trunk": {"cache_tokens": 1024, "threads": 1, "num_cpus": 0.1},
        "monitoring": {"port": free_port(HOST)},
    }
    file = tmp_path / "serve.yaml"

    def deploy(args: dict[str, Any]) -> None:
        application = {
            "name": app,
            "route_prefix": "/",
            "import_path": "moesaic.serve:build",
            "args": args,
        }
        config = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": HOST, "port": port},
            "applications": [application],
        }
        file.write_text(yaml.safe_dump(config))
        head.run("serve", "deploy", str(file))

    # A spec that is wrong says so, and nothing is left of the attempt but that.
    deploy(spec | {"hosts": [{"count": 1, "slots": 1}]})
    wait_until(lambda: status_of(head, app) == "DEPLOY_FAILED", 120)
    assert "room" in head.run("serve", "status")
    deploy(spec)
    wait_running(head, app)
    with Client(f"http://{HOST}:{port}") as client:
        wanted = text_of(client, "m", TOKENS)
        told = json.loads(head.run("moesaic", "status", "--json"))
        assert told["name"] == NAME, "the only cluster there"
        assert len(told["cluster"]["hosts"]) == 2
        # Another model, while requests go on.
        with asking(client, "m", TOKENS, wanted) as wrong:
            deploy(spec | {"models": [*spec["models"], {"name": "two", "path": str(two)}]})
            wait_until(lambda: "two" in [model.id for model in client.models()], 200)
            wait_running(head, app)
            assert text_of(client, "two", TOKENS)
            deploy(spec)
            wait_until(lambda: "two" not in [model.id for model in client.models()], 200)
            wait_running(head, app)
        assert not wrong
        wait_until(lambda: status_of(head, f"{app}:two") == "gone", 120)
        # What needs no other ingress can be changed by `moesaic apply`, too.
        args = tmp_path / "args.yaml"
        args.write_text(yaml.safe_dump(spec | {"hosts": [{**spec["hosts"][0], "count": 3}]}))
        assert "hosts.0.count" in head.run("moesaic", "apply", str(args), "--dry-run")
        head.run("moesaic", "apply", str(args))
        told = json.loads(head.run("moesaic", "status", "--json"))
        assert len(told["cluster"]["hosts"]) == 3
        assert text_of(client, "m", TOKENS) == wanted
    head.run("moesaic", "down", "--name", NAME)
    assert status_of(head, app) == "gone"
    assert "no cluster" in head.run("moesaic", "status", "--name", NAME, fails=True)
