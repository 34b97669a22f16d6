"""Ray as this project uses it: joining one that is not there, and hosts as its actors."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from moesaic.actors.host.host import ExpertHost
from moesaic.actors.host.host_actor import RayExpertHost
from moesaic.actors.runtime import ray_border
from moesaic.actors.runtime.ray_border import end_ray, join_ray, start_ray
from moesaic.actors.serve import end_at_once, launch
from moesaic.cluster.spec.spec import parse_spec
from moesaic.proto.errors import ClusterError


@pytest.mark.timeout(30)
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_a_ray_that_is_gone_is_named_at_once(host: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"{host}:{taken.getsockname()[1]}"
        with pytest.raises(ClusterError, match="no Ray answers at this address"):
            join_ray(address, "local")
        spec = parse_spec({"models": [{"name": "m", "path": "p"}], "ray": {"address": address}})
        with pytest.raises(ClusterError, match="no Ray answers at this address"):
            start_ray(spec)


def test_ray_offers_what_a_host_does() -> None:
    def public(cls: type) -> set[str]:
        return {name for name in vars(cls) if not name.startswith("_")}

    hidden = {"check_health", "close"}  # its report looks after its health, and Ray ends it
    assert public(RayExpertHost) == public(ExpertHost) - hidden


def test_an_embedded_ray_ends_with_the_last_cluster_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = parse_spec({"models": [{"name": "m", "path": "p"}]})
    running = False

    def start(said: object, **options: object) -> None:
        nonlocal running
        running = True

    def end() -> None:
        nonlocal running
        running = False

    monkeypatch.setattr(ray_border, "start_embedded", start)
    monkeypatch.setattr(ray_border, "_need_token", lambda spec: None)
    monkeypatch.setattr(ray_border.ray, "shutdown", end)
    monkeypatch.setattr(ray_border.ray, "is_initialized", lambda: running)
    assert start_ray(spec)
    assert start_ray(spec)
    end_ray()
    assert running
    end_ray()
    assert not running
    # One that the program started, or that ended behind our back, is not counted.
    running = True
    assert not start_ray(spec)
    running = False
    assert start_ray(spec)
    running = False
    assert start_ray(spec)
    end_ray()
    assert not running


def test_what_cannot_be_ended_keeps_nothing_else_running(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    class Keeper:
        def close(self) -> None:
            ended.append("hosts")

    def fails(*_: object, **__: object) -> None:
        raise ClusterError("Serve: no answer")

    monkeypatch.setattr(launch, "leave_serve", fails)
    monkeypatch.setattr(launch, "drain", fails)
    monkeypatch.setattr(launch, "forget_all", lambda namespace: ended.append("store"))
    monkeypatch.setattr(launch, "end_ray", lambda: ended.append("ray"))
    monkeypatch.setattr(launch.ray, "kill", lambda actor, no_restart: ended.append(actor))
    keeper: Any = Keeper()
    launched = launch.Launched(
        spec=parse_spec({"models": [{"name": "m", "path": "p"}]}),
        namespace="n",
        controller="controller",
        models={},
        provisioner=keeper,
        begun=True,
        serves=True,
        router_service="router",
        owns_ray=True,
    )
    with pytest.raises(ClusterError, match="Serve: no answer"):
        launched.close(drain_s=1.0)
    assert ended == ["router", "controller", "hosts", "store", "ray"]


def test_a_start_that_never_began_forgets_nothing_of_another_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of the same name is on the Ray: the start is refused, and undone."""
    forgotten: list[str] = []
    monkeypatch.setattr(launch, "forget_all", forgotten.append)
    monkeypatch.setattr(end_at_once, "forget_all", forgotten.append)
    spec = parse_spec({"name": "taken", "ray": {"address": "auto"}, "models": []})
    launch.Launched(spec=spec, namespace="moesaic-taken", models={}).close()
    monkeypatch.setattr(end_at_once.ray, "is_initialized", lambda: True)
    end_at_once.end_at_once(spec)
    assert forgotten == []
