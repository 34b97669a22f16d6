"""The trunk does not grow with the number of experts; hosts take the experts' size and little more.

Each measurement is a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.models.architectures import tiny_model

MIB = 1 << 20
# Python, torch, transformers and Ray's worker are there before an expert is.
BIG: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "head_dim": 64,
}

TRUNK = """
import json, sys, psutil, torch
from pathlib import Path
from typing import Any
import moesaic
from moesaic.models.trunk.trunk import load_trunk
before = psutil.Process().memory_info().rss
trunk = load_trunk(Path(sys.argv[1]), dtype=torch.float32, device=torch.device("cpu"))
bytes_ = sum(p.nbytes for p in trunk.parameters())
print(json.dumps([psutil.Process().memory_info().rss - before, bytes_]))
"""

HOST = """
import json, sys, psutil
from pathlib import Path
from typing import Any
import moesaic
from moesaic.actors.host.host import ExpertHost
from moesaic.cluster.expert_keys import ExpertKey, first_versions
from moesaic.cluster.placement import (ModelRef, ModelShape)
from moesaic.models.trunk.config import read_config
from moesaic.models.trunk.experts_layers import experts_layers
from moesaic.models.trunk.trunk import meta_model
layers = experts_layers(meta_model(read_config(Path(sys.argv[1]))))
host = ExpertHost("host", node="here", device="cpu", threads=1)
before = psutil.Process().memory_info().rss
shape = ModelShape(model="m", experts={la.layer: la.num_experts for la in layers})
keys = [ExpertKey("m", la.layer, e) for la in layers for e in range(la.num_experts)]
wanted = first_versions(keys)
host.load([(ModelRef(name="m", dtype="float32", path=sys.argv[1]), shape)], wanted)
report = host.report()
print(json.dumps([report.rss_bytes - before, report.weight_bytes]))
host.close()
"""


def measure(script: str, folder: Path) -> tuple[int, int]:
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    grown, held = json.loads(done.stdout.splitlines()[-1])
    return grown, held


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    made = {}
    for experts in (4, 8):
        made[experts] = tmp_path_factory.mktemp(f"experts{experts}")
        tiny_model("mixtral", num_local_experts=experts, **BIG).save_pretrained(made[experts])
    return made


@pytest.mark.slow
def test_the_trunk_does_not_grow_with_the_number_of_experts(folders: dict[int, Path]) -> None:
    four, trunk_bytes = measure(TRUNK, folders[4])
    eight, _ = measure(TRUNK, folders[8])
    more_experts = 4 * 4 * 3 * 256 * 2048 * 4  # four experts more in each of four layers
    assert more_experts > 90 * MIB
    assert trunk_bytes < 10 * MIB
    # Importing transformers' parts is most of it, and varies by some MiB.
    assert abs(eight - four) < 16 * MIB


def test_a_host_takes_the_size_of_its_experts_and_a_little(folders: dict[int, Path]) -> None:
    grown, weight_bytes = measure(HOST, folders[8])
    assert weight_bytes == 8 * 4 * 3 * 256 * 2048 * 4
    assert grown < 1.1 * weight_bytes + 48 * MIB
