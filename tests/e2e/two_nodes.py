"""Run inside the first node's network namespace by test_two_nodes.py: up, use, report as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moesaic
from tests.helpers.processes.live import text_in_background, text_of, wait_whole

TEXT = "the quick fox"
TOKENS = 200


def main(folder: str, cut: str = "") -> None:
    """``cut``: the link to the other node, which goes down in the middle of a text."""
    spec = {
        "name": "nodes",
        "ray": {"address": "auto"},
        "network": {"bind": "node", "lending": "never"},
        "models": [{"name": "m", "path": folder, "replicas": 2 if cut else 1}],
        "hosts": [{"count": 2, "placement_group": "STRICT_SPREAD", "labels": {}}],
        "trunk": {"cache_tokens": 1024, "threads": 1},
        "endpoint": {"port": 0},
        "monitoring": {"port": 0},
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        output = plain.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
    with moesaic.up(spec) as cluster, moesaic.Client(cluster.url or "") as client:
        wait_whole(cluster)
        with text_in_background(client, "m", TOKENS) as result:
            if cut:
                subprocess.run(["ip", "link", "set", cut, "down"], check=True, timeout=10)
            texts = [result()]
        texts.append(text_of(client, "m", TOKENS))
        hosts = cluster.status().hosts
        if cut:
            # Ray on the other node is to hear that the cluster ends.
            subprocess.run(["ip", "link", "set", cut, "up"], check=True, timeout=10)
    report = {
        "texts": texts,
        "expected": tokenizer.decode(output, skip_special_tokens=True),
        "nodes": [host.process and host.process.node for host in hosts],
        "calls": [0 if host.process is None else host.process.calls for host in hosts],
        "states": [host.state for host in hosts],
    }
    print("REPORT " + json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
