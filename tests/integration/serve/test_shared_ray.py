"""Clusters that share a Ray, and its Serve, with each other and with other programs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve

import moesaic
from moesaic import Client
from moesaic.actors.runtime.ports import free_port
from moesaic.actors.runtime.ray_border import controller_of, kill_named, namespace_of
from moesaic.actors.serve.serve_border import find_serve
from moesaic.handle import Cluster
from moesaic.proto.errors import ClusterError
from moesaic.session import own_session, remove_session
from tests.helpers.processes.live import ON_RAY, program_ray, text_of
from tests.integration.conftest import save_model

pytestmark = ON_RAY
HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("shared"), "mixtral")


@pytest.fixture(scope="module", autouse=True)
def shared_ray() -> Iterator[None]:
    """One that no cluster started, and none ends."""
    with program_ray(8):
        yield


def spec_of(folder: Path, name: str, **endpoint: Any) -> dict[str, Any]:
    return {
        "name": f"{name}-{os.getpid()}",
        "models": [{"name": name, "path": str(folder)}],
        "hosts": [{"count": 1, "num_cpus": 0.1}],
        "trunk": {"cache_tokens": 1024, "threads": 1, "num_cpus": 0.1},
        "endpoint": endpoint,
        "monitoring": {"port": 0},
        "balance": {"auto": False},
    }


def works(cluster: Cluster, model: str) -> bool:
    with Client(cluster.url or "") as client:
        return bool(text_of(client, model, 3)) and [one.id for one in client.models()] == [model]


@pytest.mark.slow
def test_a_second_cluster_is_beside_the_first_or_refused_at_once(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    port, other = free_port(HOST), free_port(HOST)
    steps: list[str] = []
    with moesaic.up(spec_of(folder, "one", host=HOST, port=port)) as one:
        assert one.url == f"http://{HOST}:{port}"
        for endpoint in ({"port": other}, {"host": "0.0.0.0"}):
            wanted = spec_of(folder, "two", **endpoint)
            steps.clear()
            with pytest.raises(ClusterError, match=f"{HOST}:{port}; set `endpoint:"):
                moesaic.up(wanted, progress=lambda step, done, of: steps.append(step))
            assert steps[-1] == "starting Ray"
            with pytest.raises(ClusterError, match="has no controller"):
                controller_of(namespace_of(wanted["name"]))
        two = moesaic.up(spec_of(folder, "two", port=port))
        try:
            assert two.url == f"{one.url}/two-{os.getpid()}"
            assert works(one, "one")
            assert works(two, "two")
            one.down()
            assert works(two, "two")
        finally:
            two.down()
    # The last one to leave ends the Serve that the first one started.
    assert find_serve() is None
    # Of what Serve leaves behind Ray tells by itself.
    lines = capfd.readouterr().out.splitlines()
    assert [line for line in lines if "(raylet)" not in line] == []


@pytest.mark.slow
def test_what_a_cluster_left_whose_controller_is_gone_is_ended(folder: Path) -> None:
    port, other = free_port(HOST), free_port(HOST)
    dead = moesaic.up(spec_of(folder, "dead", port=port))
    dead.detach()
    kill_named(namespace_of(dead.name))
    session = own_session(dead.name)
    assert session is not None
    remove_session(session)
    left = find_serve()
    assert left is not None
    assert left.of(namespace_of(dead.name)) == sorted(left.routes)
    # At another address, too: nothing is left of the Serve that had the first.
    with moesaic.up(spec_of(folder, "next", port=other)) as cluster:
        assert cluster.url == f"http://{HOST}:{other}"
        assert works(cluster, "next")
    assert find_serve() is None


@pytest.mark.slow
def test_applications_of_others_are_left_alone(folder: Path) -> None:
    theirs: Any = serve.deployment(lambda request: "theirs", name="Theirs")
    port = free_port(HOST)
    serve.start(http_options={"host": HOST, "port": port})
    try:
        with pytest.raises(ClusterError, match=r"\(applications: none\).*host: 127"):
            moesaic.up(spec_of(folder, "ours", port=free_port(HOST)))
        serve.run(theirs.bind(), name="theirs", route_prefix="/")
        with moesaic.up(spec_of(folder, "ours", port=0)) as cluster:
            assert works(cluster, "ours")
            assert httpx.get(f"http://{HOST}:{port}/").text == "theirs"
        assert httpx.get(f"http://{HOST}:{port}/").text == "theirs"
    finally:
        serve.shutdown()
