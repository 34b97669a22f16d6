"""A cluster on Ray whose trunks and hosts exchange tensors over groups."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesaic
from tests.helpers.processes.live import ON_RAY, processes_of
from tests.integration.conftest import save_model

pytestmark = [*ON_RAY, pytest.mark.slow]


def test_texts_over_groups_are_those_of_plain_transformers(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "mixtral")
    spec = {
        "name": f"groups-{os.getpid()}",
        "network": {"transport": "group"},
        "models": [{"name": "m", "path": str(folder), "replicas": 2}],
        "hosts": [{"count": 2}],
        "endpoint": None,
        "balance": {"auto": False},
    }
    prompt = torch.randint(3, 300, (1, 12), generator=torch.Generator().manual_seed(3))
    plain: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    wanted = plain.generate(prompt, max_new_tokens=12, do_sample=False)
    with moesaic.up(spec) as cluster:
        trunk: Any = cluster.from_pretrained("m")
        router = cluster._trunks[0].router
        assert torch.equal(trunk.generate(prompt, max_new_tokens=12, do_sample=False), wanted)
        assert set(router.stats().transports.values()) == {"gloo"}
        os.kill(processes_of(cluster)["host-0"].pid, signal.SIGKILL)
        assert torch.equal(trunk.generate(prompt, max_new_tokens=12, do_sample=False), wanted)
