"""Run in namespaces of its own by test_nodes_come_and_go.py: a Ray whose autoscaler makes nodes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import moesaic

ADDRESS = "127.0.0.1:6379"
AUTOSCALER: dict[str, Any] = {
    "cluster_name": "fake",
    "max_workers": 2,
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 0.1,
    "provider": {
        "type": "fake_multinode",
        "gcs_address": ADDRESS,
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {
            "resources": {"CPU": 8, "place": 2},
            "node_config": {},
            "max_workers": 0,
        },
        "worker": {
            "resources": {"CPU": 2, "place": 1, "object_store_memory": 100_000_000},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 2,
        },
    },
    "auth": {},
    "docker": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "rsync_exclude": [],
    "rsync_filter": [],
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
}


def start_ray(ray_dir: str) -> None:
    config = Path(ray_dir) / "autoscaler.yaml"
    config.write_text(yaml.safe_dump(AUTOSCALER))
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=10)
    words = [
        *("--head", "--port=6379", "--node-ip-address=127.0.0.1", "--include-dashboard=false"),
        *("--num-cpus=8", '--resources={"place": 2}', "--object-store-memory=100000000"),
        *(f"--autoscaling-config={config}", f"--temp-dir={ray_dir}", "--disable-usage-stats"),
    ]
    ray_command = str(Path(sys.executable).parent / "ray")
    subprocess.run(
        [ray_command, "start", *words],
        check=True,
        timeout=60,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def alive() -> int:
    return sum(1 for node in ray.nodes() if node["Alive"])


def wait_until(true: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not true() and time.monotonic() < deadline:
        time.sleep(0.2)


def main(folder: str, ray_dir: str) -> None:
    start_ray(ray_dir)
    spec = {
        "name": "scaled",
        "ray": {"address": ADDRESS},
        "models": [{"name": "m", "path": folder}],
        "hosts": [{"count": 2, "min_count": 1, "max_count": 3, "resources": {"place": 1}}],
        "trunk": {"threads": 1},
        "endpoint": None,
        "balance": {"auto": False, "lease_s": 3},
        # A node takes longer, so that what is shown meanwhile can be read.
        "autoscale": {"up_after_s": 3600, "down_after_s": 3600, "pending_s": 1},
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the quick fox", return_tensors="pt").input_ids

    def text(model: Any) -> str:
        with torch.no_grad():
            output = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        return tokenizer.decode(output, skip_special_tokens=True)

    expected = text(AutoModelForCausalLM.from_pretrained(folder).eval())
    texts: list[str] = []
    error: str | None = None
    stop = threading.Event()
    report: dict[str, Any] = {"expected": expected, "nodes": {}}
    with moesaic.up(spec) as cluster:
        model = cluster.from_pretrained("m")

        def ask() -> None:
            nonlocal error
            try:
                while not stop.is_set():
                    texts.append(text(model))
            except Exception as failure:
                error = f"{type(failure).__name__}: {failure}"

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            report["nodes"]["before"] = alive()
            grown = cluster.scale(3, timeout_s=60)
            new = grown.arriving_hosts[0]
            report["waiting"] = grown.obstacles.get(new, "")

            def holds_experts() -> bool:
                process = cluster.status().processes.get(new)
                return process is not None and process.replicas > 0

            # Its experts come by themselves.
            wait_until(holds_experts, 60)
            report["nodes"]["grown"] = alive()
            processes = cluster.status().processes
            report["head"] = processes["host-0"].node
            report["node_of_new_host"] = processes[new].node
            report["leaving"] = cluster.scale(2, timeout_s=60).leaving_hosts
            wait_until(lambda: alive() == 1, 60)
            report["nodes"]["after"] = alive()
        finally:
            stop.set()
            asking.join(60)
    report |= {"texts": sorted(set(texts)), "requests": len(texts), "error": error}
    print("REPORT " + json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
