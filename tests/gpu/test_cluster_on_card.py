"""A whole cluster on Ray that shares one card: two hosts and a trunk."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
import torch

from moesaic import Client
from moesaic.actors.runtime.embedded_ray import started_processes
from tests.helpers.models.tiny import tiny_mixtral, tiny_text, tiny_tokenizer
from tests.helpers.processes.live import (
    ON_RAY,
    TEXT,
    processes_of,
    running,
    text_in_background,
    text_of,
    wait_replaced,
    wait_until,
)

pytestmark = [*ON_RAY, pytest.mark.cuda]

TOKENS = 300
# What torch and the driver may keep or move meanwhile in this process's own context.
SLACK_BYTES = 64 * 2**20


@pytest.mark.timeout(400)
def test_a_text_outlives_a_host_of_the_card(tmp_path: Path) -> None:
    text_outlives_a_host(tmp_path, "cuda")


def text_outlives_a_host(folder: Path, device: str) -> None:
    """Also runs with ``cpu``."""
    tiny_mixtral().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    wanted = tiny_text(TEXT, TOKENS, device=device)
    free = free_bytes(device)
    part = {"device": device, "num_gpus": 0.3 if device == "cuda" else 0}
    with running(
        "card",
        folder,
        models=[{"name": "m", "path": str(folder), "replicas": 2, "dtype": "float32"}],
        hosts=[{"count": 2, **part}],
        trunk={"cache_tokens": 1024, "threads": 1, **part},
    ) as cluster:
        with Client(cluster.url or "") as client:
            assert text_of(client, "m", TOKENS) == wanted
            victim = processes_of(cluster)["host-0"]
            with text_in_background(client, "m", TOKENS) as result:
                os.kill(victim.pid, signal.SIGKILL)
                assert result() == wanted
            wait_replaced(cluster, "host-0", victim.pid)
            assert text_of(client, "m", TOKENS) == wanted
        ours = started_processes()
    _, left = psutil.wait_procs(ours, timeout=20)
    assert not left
    wait_until(lambda: free_bytes(device) >= free - SLACK_BYTES, 20)


def free_bytes(device: str) -> int:
    """Of the card's memory, as all processes see it."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else 0
