"""Run inside the first node's network namespace by test_two_nodes.py: up, use, report as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moesaic


def main(folder: str) -> None:
    spec = {
        "name": "nodes",
        "ray": {"address": "auto"},
        "network": {"bind": "node"},
        "models": [{"name": "m", "path": folder, "replicas": 1}],
        "hosts": [{"count": 2, "spread": "STRICT_SPREAD", "labels": {}}],
        "trunk": {"cache_tokens": 1024, "threads": 1},
        "endpoint": {"port": 0},
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer("the quick fox", return_tensors="pt").input_ids
    with torch.no_grad():
        output = plain.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    with moesaic.up(spec) as cluster, moesaic.Client(cluster.url or "") as client:
        answer = client.complete("the quick fox", max_tokens=24, temperature=0.0)
        hosts = cluster.status()["hosts"]
    report = {
        "text": answer.text,
        "expected": tokenizer.decode(output, skip_special_tokens=True),
        "nodes": [host["node"] for host in hosts],
        "calls": [host["calls"] for host in hosts],
    }
    print("REPORT " + json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
