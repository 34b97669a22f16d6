"""Run inside namespaces of its own by test_gcs_restart.py: Ray's GCS is killed and started anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

import moesaic
from tests.helpers.processes.live import streams, text_of, wait_replaced, wait_whole

RAY = str(Path(sys.executable).parent / "ray")
MODEL = "m"
TOKENS = 150
STREAMS = 16


def start_ray(temp_dir: str, address: str) -> None:
    words = ["--head", f"--node-ip-address={address}", "--port=6399", "--num-cpus=8"]
    words += ["--include-dashboard=false", "--object-store-memory=100000000"]
    words += [f"--temp-dir={temp_dir}", "--disable-usage-stats"]
    subprocess.run([RAY, "start", *words], check=True, capture_output=True, timeout=60)


def gcs() -> psutil.Process:
    (found,) = [p for p in psutil.process_iter() if p.name() == "gcs_server"]
    return found


def main(folder: str, temp_dir: str, address: str) -> None:
    start_ray(temp_dir, address)
    spec = {
        "name": "restarted",
        "ray": {"address": "auto"},
        "network": {"bind": "node"},
        "models": [{"name": MODEL, "path": folder, "replicas": 2}],
        "hosts": [{"count": 2}],
        "trunk": {"cache_tokens": 1024, "threads": 1},
        "endpoint": {"port": 0},
        "monitoring": {"port": 0},
        "balance": {"auto": False, "lease_s": 2},
    }
    report = {}
    with moesaic.up(spec) as cluster, moesaic.Client(cluster.url or "") as client:
        report["expected"] = text_of(client, MODEL, TOKENS)
        term = cluster.status().controller.term
        with streams(client, MODEL, TOKENS, STREAMS) as texts:
            old = gcs()
            command, environment = old.cmdline(), old.environ()
            old.kill()
            old.wait(10)
            # Serving needs no GCS.
            report["while_down"] = text_of(client, MODEL, TOKENS)
            quiet = subprocess.DEVNULL
            new = subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet)
            (report["streamed"],) = texts()
        wait_whole(cluster)
        report["after"] = text_of(client, MODEL, TOKENS)
        # The control plane works on: a host's experts move, and what was lost is started anew.
        cluster.drain("host-1")
        status = cluster.status()
        report["same_controller"] = status.controller.term == term
        report["leaving"] = status.balancing.draining_hosts
        pid = status.processes["host-0"].pid
        cluster.undrain("host-1")
        wait_whole(cluster)
        os.kill(pid, 9)
        wait_replaced(cluster, "host-0", pid)
        report["at_last"] = text_of(client, MODEL, TOKENS)
    new.kill()
    new.wait(10)
    print("REPORT " + json.dumps(report), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
