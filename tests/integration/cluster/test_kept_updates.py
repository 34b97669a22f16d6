"""Experts get new weights by their checkpoint's names, and keep them when the cluster ends. The
second cluster lends what the first one sent."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic import Client
from moesaic.cli.main import main
from moesaic.cluster.reports.updates import WeightUpdateReport
from moesaic.handle import Cluster
from moesaic.proto.errors import CheckpointError, ClusterError
from tests.helpers.pool.transports import settles
from tests.helpers.processes.keepers import keepers
from tests.helpers.processes.live import (
    ON_RAY,
    processes_of,
    running,
    text_in_background,
    text_of,
    wait_replaced,
)
from tests.integration.conftest import save_model

pytestmark = ON_RAY

Capture = pytest.CaptureFixture[str]
TOKENS = 40
LONG = 200  # enough for a host to be killed meanwhile


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "mixtral")


@contextmanager
def pool_of(folder: Path, updates: Path, lending: str) -> Iterator[tuple[Cluster, Client]]:
    # With one replica of each expert, only a killed host's successor can serve its experts.
    model = {"name": "m", "path": str(folder), "updates": str(updates), "replicas": 1}
    network = {"lending": lending}
    with running("kept", folder, hosts=[{"count": 2}], models=[model], network=network) as cluster:
        assert cluster.url is not None
        with Client(cluster.url) as client:
            yield cluster, client


def other_experts(folder: Path) -> dict[str, Tensor]:
    """Other weights for all experts of layer 0, by the names on disk."""
    stored = load_file(folder / "model.safetensors")
    drawn = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(tensor.shape, generator=drawn) * 0.5
        for name, tensor in stored.items()
        if ".layers.0." in name and ".experts." in name
    }


def kill_a_host_that_lends(cluster: Cluster, client: Client, wanted: str) -> psutil.Process:
    """Check that nothing is sent, lost or loaded again; return the keeper of the memory."""
    before = processes_of(cluster)
    sent = sum(process.rows for process in before.values())
    (router,) = cluster.status().routers
    assert {path.host: path.lent for path in router.paths} == {"host-0": True, "host-1": True}
    with text_in_background(client, "m", LONG) as result:
        os.kill(before["host-0"].pid, signal.SIGKILL)
        assert result() == wanted
    wait_replaced(cluster, "host-0", before["host-0"].pid)
    assert text_of(client, "m", LONG) == wanted
    after = processes_of(cluster)
    assert sum(process.rows for process in after.values()) <= sent
    assert after["host-0"].adopted_replicas == before["host-0"].replicas
    assert after["host-1"].adopted_replicas == 0
    (keeper,) = keepers(psutil.Process(after["host-0"].pid).ppid())
    return keeper


@pytest.mark.slow
@pytest.mark.timeout(300)  # it starts two clusters
def test_updates_outlive_hosts_and_clusters(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    updates, changed = tmp_path / "updates", other_experts(folder)
    save_file(changed, tmp_path / "new.safetensors")
    with pool_of(folder, updates, "never") as (cluster, client):
        old = text_of(client, "m", TOKENS)
        put = ["expert", "put", str(tmp_path / "new.safetensors"), "--name", cluster.name]
        assert main([*put, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said.keys() == WeightUpdateReport.model_fields.keys()
        assert (said["number"], said["experts"], said["volatile"]) == (2, 8, False)
        new = text_of(client, "m", TOKENS)
        assert new != old
        model = cluster.status().models[0]
        assert (model.updated_experts, model.volatile_experts) == (8, 0)
        # Each expert has one replica, so that of the new host comes from the file.
        victim = cluster.experts("m", 0)[3].replicas[0].host
        pid = processes_of(cluster)[victim].pid
        os.kill(pid, signal.SIGKILL)
        wait_replaced(cluster, victim, pid)
        assert text_of(client, "m", TOKENS) == new
        got = tmp_path / "got.safetensors"
        assert main(["expert", "get", "0", "3", str(got), "--name", cluster.name]) == 0
        (prefix,) = {name.partition(".experts.")[0] for name in changed}
        of_three = {n: t for n, t in changed.items() if n.startswith(f"{prefix}.experts.3.")}
        read = load_file(got)
        assert read.keys() == of_three.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in of_three.items())
        # A second update is taken back while the first one stays in effect. It waits for its
        # expert's only host.
        victim = cluster.experts("m", 0)[3].replicas[0].host
        os.kill(processes_of(cluster)[victim].pid, signal.SIGKILL)
        cluster.update_expert("m", {name: tensor * 2 for name, tensor in of_three.items()})
        assert text_of(client, "m", TOKENS) != new
        assert main(["expert", "revert", "--name", cluster.name]) == 0
        assert "update 4 of m takes back update 3: 1 expert" in capsys.readouterr().err
        assert text_of(client, "m", TOKENS) == new
        sent = text_of(client, "m", LONG)
    with pool_of(folder, updates, "always") as (cluster, client):
        assert text_of(client, "m", LONG) == sent
        keeper = kill_a_host_that_lends(cluster, client, sent)
        assert cluster.status().models[0].updated_experts == 8
        assert cluster.revert_expert("m").number == 5
        assert text_of(client, "m", TOKENS) == old
        assert cluster.status().models[0].updated_experts == 0
        with pytest.raises(ClusterError, match="no update of its weights is in effect"):
            cluster.revert_expert("m")
        half = dict(list(changed.items())[:1])
        with pytest.raises(CheckpointError, match="is missing; an update must have all tensors"):
            cluster.update_expert("m", half)
        with pytest.raises(ClusterError, match="'x' is not one of the cluster's models"):
            cluster.update_expert("x", changed)
    assert sorted(file.name for file in updates.iterdir()) == [
        *("00000002.json", "00000002.safetensors", "00000003.json", "00000003.safetensors"),
        *("00000004.json", "00000005.json"),
    ]
    assert settles(lambda: not keeper.is_running())
