"""`moesaic apply`: a running cluster follows another spec, and nobody's request fails for it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from moesaic import Client
from moesaic.actors.store.durable_state import stored_deployment
from moesaic.cli.main import main
from moesaic.handle import Cluster
from moesaic.proto.errors import ClusterError, SpecError, UnknownModel
from tests.helpers.processes.live import ON_RAY, asking, hosts_of, running, text_of, wait_until
from tests.integration.conftest import save_model

pytestmark = [*ON_RAY, pytest.mark.timeout(600)]

TOKENS = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: save_model(root / name, name, seed=seed)
        for seed, name in enumerate(("mixtral", "qwen2_moe"))
    }


@pytest.fixture(scope="module")
def cluster(folders: dict[str, Path]) -> Iterator[Cluster]:
    hosts = [{"count": 2, "threads": 1, "num_cpus": 0.1}]
    trunk = {"cache_tokens": 1024, "threads": 1, "num_cpus": 0.1}
    with running("apply", folders["mixtral"], hosts=hosts, trunk=trunk) as cluster:
        yield cluster


@pytest.fixture
def values(cluster: Cluster) -> dict[str, Any]:
    """The present spec's values, for a test to change."""
    found = stored_deployment(f"moesaic-{cluster.name}")
    assert found is not None
    return copy.deepcopy(found.spec.model_dump(mode="json", exclude_unset=True))


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    assert cluster.url is not None
    with Client(cluster.url) as client:
        yield client


def models(client: Client) -> list[str]:
    return sorted(one.id for one in client.models())


def test_a_model_comes_and_goes_and_the_other_is_not_touched(
    cluster: Cluster, client: Client, values: dict[str, Any], folders: dict[str, Path]
) -> None:
    wanted = text_of(client, "m", TOKENS)
    before = copy.deepcopy(values)
    values["models"].append(
        {"name": "org/second", "aliases": ["two"], "path": str(folders["qwen2_moe"])}
    )
    planned = cluster.apply(values, dry_run=True)
    assert [one.path for one in planned.differences] == ["models.org/second"]
    assert planned.differences[0].before is None
    assert not planned.restarts
    assert not planned.applied
    assert models(client) == ["m"], "nothing has changed"
    with asking(client, "m", TOKENS, wanted) as wrong:
        done = cluster.apply(values)
        assert done.differences == planned.differences
        assert done.applied
        assert models(client) == ["m", "org/second", "two"]
        second = text_of(client, "two", TOKENS)
        assert second
        with asking(client, "org/second", TOKENS, second) as also_wrong:
            assert cluster.apply(values).differences == []
        assert not also_wrong
        done = cluster.apply(before)
        assert [one.path for one in done.differences] == ["models.org/second"]
        assert done.differences[0].after is None
        assert models(client) == ["m"]
        with pytest.raises(UnknownModel):
            text_of(client, "two", TOKENS)
        wait_until(lambda: [one.name for one in cluster.status().models] == ["m"])

        def replicas() -> int:
            return sum(host.process.replicas for host in hosts_of(cluster).values() if host.process)

        held = sum(len(one.replicas) for one in cluster.experts())
        wait_until(lambda: replicas() == held)
        cluster.apply(values)
        assert text_of(client, "two", TOKENS) == second, "it comes again, and is the same"
        cluster.apply(before)
    assert not wrong


@pytest.mark.slow
def test_groups_grow_come_and_go(cluster: Cluster, client: Client, values: dict[str, Any]) -> None:
    wanted, before = text_of(client, "m", TOKENS), copy.deepcopy(values)
    with asking(client, "m", TOKENS, wanted) as wrong:
        values["hosts"][0]["count"] = 3
        values["hosts"].append({"count": 1, "threads": 1, "num_cpus": 0.1, "speed": 2.0})
        done = cluster.apply(values)
        assert [one.path for one in done.differences] == ["hosts.0.count", "hosts.1"]
        assert not done.restarts
        assert sorted(hosts_of(cluster)) == ["host-0", "host-1", "host-2", "host-3"]
        # Another number of threads needs other processes.
        values["hosts"][1]["threads"] = 2
        with pytest.raises(ClusterError, match=r"have to start anew.*the hosts of group 1"):
            cluster.apply(values)
        assert sorted(hosts_of(cluster)) == ["host-0", "host-1", "host-2", "host-3"]
        cluster.apply(values, restarts=True)
        assert sorted(hosts_of(cluster)) == ["host-0", "host-1", "host-2", "host-4"]
        cluster.apply(before)
        assert sorted(hosts_of(cluster)) == ["host-0", "host-1"]
    assert not wrong


@pytest.mark.slow
def test_limits_and_trunks_change_under_load(
    cluster: Cluster, client: Client, values: dict[str, Any]
) -> None:
    wanted, before = text_of(client, "m", TOKENS), copy.deepcopy(values)
    with asking(client, "m", TOKENS, wanted) as wrong:
        values["endpoint"]["limits"] = {"answer_tokens": TOKENS}
        values["models"][0]["aliases"] = ["other"]
        values["balance"]["every_s"] = 1.0
        done = cluster.apply(values)
        paths = ["models.m.aliases", "endpoint.limits.answer_tokens", "balance.every_s"]
        assert [one.path for one in done.differences] == paths
        assert not done.restarts
        assert len(text_of(client, "other", TOKENS)) == len(wanted)
        with pytest.raises(Exception, match="at most 24"):
            text_of(client, "m", TOKENS + 1)
        values["trunk"]["max_requests"] = 7
        values["endpoint"]["allowed_hosts"] = ["example.org"]
        done = cluster.apply(values, restarts=True)
        assert [words.split(":")[0] for words in done.restarts] == [
            "the trunks of model m, one after the other",
            "the endpoint's process",
        ]
        cluster.apply(before, restarts=True)
    assert not wrong


@pytest.mark.slow
def test_a_model_is_replaced(
    cluster: Cluster, client: Client, values: dict[str, Any], folders: dict[str, Path]
) -> None:
    before, first = copy.deepcopy(values), text_of(client, "m", TOKENS)
    values["models"][0]["path"] = str(folders["qwen2_moe"])
    done = cluster.apply(values, restarts=True)
    assert done.restarts == ["model m: not served until it is loaded again"]
    second = text_of(client, "m", TOKENS)
    assert second != first
    cluster.apply(before, restarts=True)
    assert text_of(client, "m", TOKENS) == first


@pytest.mark.parametrize(
    ("section", "value", "said"),
    [
        ("network", {"transport": "grpc"}, "network.transport: all hosts and trunks"),
        ("endpoint", None, "endpoint: a cluster has one from its start"),
        ("traces", {"sample": 0.5}, "traces.sample: every process reads it"),
        ("hosts", [{"count": 1, "slots": 1}], "hosts"),
        ("models", [{"name": "m", "path": "/nowhere"}], "models.0.path"),
        ("nonsense", 1, "nonsense"),
    ],
)
def test_what_cannot_be_changes_nothing(
    cluster: Cluster, client: Client, values: dict[str, Any], section: str, value: Any, said: str
) -> None:
    before = stored_deployment(f"moesaic-{cluster.name}")
    values[section] = value
    with pytest.raises((SpecError, ClusterError, Exception), match=said):
        cluster.apply(values, restarts=True)
    after = stored_deployment(f"moesaic-{cluster.name}")
    assert before is not None
    assert after is not None
    assert after.to_json() == before.to_json()
    assert models(client) == ["m"]


@pytest.mark.slow
def test_the_controller_goes_on_with_the_last_spec(
    cluster: Cluster, client: Client, values: dict[str, Any], folders: dict[str, Path]
) -> None:
    before = copy.deepcopy(values)
    values["models"].append({"name": "second", "path": str(folders["qwen2_moe"])})
    values["hosts"].append({"count": 1, "threads": 1, "num_cpus": 0.1})
    cluster.apply(values)
    said = text_of(client, "second", TOKENS)
    term, there = cluster.status().controller.term, sorted(hosts_of(cluster))
    controller: Any = ray.get_actor("controller", namespace=f"moesaic-{cluster.name}")
    ray.kill(controller, no_restart=False)

    def is_back() -> bool:
        try:
            return cluster.status().controller.term > term
        except ClusterError:
            return False

    wait_until(is_back)
    wait_until(lambda: sorted(one.name for one in cluster.status().models) == ["m", "second"])
    assert sorted(hosts_of(cluster)) == there
    assert text_of(client, "second", TOKENS) == said
    assert cluster.apply(values, dry_run=True).differences == []
    cluster.apply(before)
    assert sorted(hosts_of(cluster)) == ["host-0", "host-1"]


def test_the_command(
    cluster: Cluster,
    values: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(values))
    assert main(["apply", str(file), "--dry-run"]) == 0
    assert "runs as the spec says" in capsys.readouterr().out
    values["hosts"][0]["cost_per_hour"] = 2.5
    values["trunk"]["max_waiting"] = 3
    file.write_text(yaml.safe_dump(values))
    assert main(["apply", str(file), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "hosts.0.cost_per_hour" in said
    assert "restarts: the trunks of model m" in said
    assert max(map(len, said.splitlines())) <= 80
    assert main(["apply", str(file), "--json"]) == 2, "it cannot ask"
    capsys.readouterr()
    assert main(["apply", str(file), "--json", "--yes"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["applied"]
    assert [one["path"] for one in told["differences"]] == [
        "hosts.0.cost_per_hour",
        "trunk.max_waiting",
    ]
