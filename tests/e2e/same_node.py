"""Run in namespaces of its own by test_same_node.py: hosts on two nodes are killed in turn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import moesaic
from moesaic.cluster.reports.status import HostProcess
from moesaic.handle import Cluster

ADDRESS = "127.0.0.1:6379"
HEAD = ("--head", "--port=6379", "--include-dashboard=false", "--node-ip-address=127.0.0.1")


def start_node(*words: str) -> None:
    every = ["--object-store-memory=100000000", "--disable-usage-stats"]
    subprocess.run(
        [str(Path(sys.executable).parent / "ray"), "start", *words, *every],
        check=True,
        timeout=60,
        stdout=subprocess.DEVNULL,
    )


def successor(cluster: Cluster, name: str, killed: HostProcess) -> HostProcess:
    """The next process of a host, once it serves."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        process = cluster.status().processes.get(name)
        if process is not None and process.pid != killed.pid and process.replicas:
            return process
        time.sleep(0.2)
    raise AssertionError(f"{name} did not come back: {cluster.status()}")


def main(folder: str, ray_dir: str) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=10)
    start_node(*HEAD, "--num-cpus=4", f"--temp-dir={ray_dir}")
    start_node(f"--address={ADDRESS}", "--num-cpus=4", '--labels="zone=b"')
    spec = {
        "name": "same",
        "ray": {"address": ADDRESS},
        "models": [{"name": "m", "path": folder}],
        "hosts": [{"count": 1}, {"count": 1, "labels": {"zone": "!a"}}],
        "endpoint": None,
        "balance": {"auto": False},
    }
    moves = []
    with moesaic.up(spec) as cluster:
        # Nodes that came later have the most room.
        for _ in range(2):
            start_node(f"--address={ADDRESS}", "--num-cpus=64")
        for name in 2 * sorted(cluster.status().processes):
            killed = cluster.status().processes[name]
            os.kill(killed.pid, signal.SIGKILL)
            then = successor(cluster, name, killed)
            moves.append([name, killed.node, then.node, then.adopted_replicas])
    print("REPORT " + json.dumps({"moves": moves}))


if __name__ == "__main__":
    main(*sys.argv[1:])
