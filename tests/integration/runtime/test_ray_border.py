"""Ray as this project uses it: joining one that is not there, and hosts as its actors."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from moesaic.actors.host.host import ExpertHost
from moesaic.actors.host.host_actor import RayExpertHost
from moesaic.actors.runtime import ray_border
from moesaic.actors.runtime.embedded_ray import EmbeddedRay
from moesaic.actors.runtime.ray_border import join_ray, start_ray
from moesaic.actors.serve import end_at_once, ending
from moesaic.actors.serve.ending import end_cluster
from moesaic.cluster.spec.spec import RaySpec, parse_spec
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


def test_a_second_cluster_of_a_program_is_on_the_same_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = parse_spec({"models": [{"name": "m", "path": "p"}]})
    own = EmbeddedRay("127.0.0.1:1", Path("/r"))
    connected: EmbeddedRay | None = None
    monkeypatch.setattr(ray_border, "start_embedded", lambda said, **_: own)
    monkeypatch.setattr(ray_border, "join_ray", lambda *_, **__: None)
    monkeypatch.setattr(ray_border, "_need_token", lambda spec: None)
    monkeypatch.setattr(ray_border, "connected_own_ray", lambda: connected)
    monkeypatch.setattr(ray_border.ray, "is_initialized", lambda: initialized)
    initialized = False
    assert start_ray(spec) == own
    initialized, connected = True, EmbeddedRay("127.0.0.1:2", Path("/s"))
    assert start_ray(spec) == connected
    assert start_ray(spec.model_copy(update={"ray": RaySpec(address="auto")})) is None
    # One that the program itself has started, or joined.
    connected = None
    assert start_ray(spec) is None


class Ended:
    """What `end_cluster` ended, in its order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **others: Any) -> None:
        self.parts: list[str] = []
        hosts = {"host-1", "host-0"}

        def end_hosts(namespace: str, names: list[str]) -> None:
            self.parts.extend(names)
            hosts.clear()

        def note(part: str) -> Any:
            return lambda *_, **__: self.parts.append(part)

        given: dict[str, Any] = {
            "others_on_ray": lambda namespace: [],
            "serves": lambda name: True,
            "drain": note("drained"),
            "leave_serve": note("serve"),
            "_actor": lambda actor, namespace: actor,
            "host_names": lambda namespace: hosts,
            "end_hosts": end_hosts,
            "forget_all": note("store"),
            "release": note("groups"),
            "end_embedded": note("ray"),
        }
        for name, double in (given | others).items():
            monkeypatch.setattr(ending, name, double)
        monkeypatch.setattr(ending.ray, "kill", lambda actor, no_restart: self.parts.append(actor))


def fails(*_: object, **__: object) -> None:
    raise ClusterError("Serve: no answer")


OWN = EmbeddedRay("127.0.0.1:1", Path("/r"))


def test_what_cannot_be_ended_keeps_nothing_else_running(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = Ended(monkeypatch, drain=fails, leave_serve=fails, others_on_ray=lambda _: ["other"])
    with pytest.raises(ClusterError, match="Serve: no answer"):
        end_cluster("c", OWN, 1.0)
    rest = ["host-0", "host-1", "store", "groups"]
    assert ended.parts == ["router-service", "controller", *rest]


def test_an_own_ray_ends_with_the_last_cluster_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = Ended(monkeypatch)
    end_cluster("c", OWN, 1.0)
    assert ended.parts[0] == "drained"
    assert ended.parts[-1] == "ray"
    assert "serve" not in ended.parts  # which ends with its Ray
    for own, others in ((OWN, ["other"]), (None, [])):
        ended = Ended(monkeypatch, others_on_ray=lambda _, others=others: others)
        end_cluster("c", own)
        assert ended.parts[0] == "serve"
        assert "ray" not in ended.parts


def test_a_start_that_never_began_forgets_nothing_of_another_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of the same name is on the Ray: the start is refused, and undone."""
    forgotten: list[str] = []
    monkeypatch.setattr(end_at_once, "forget_all", forgotten.append)
    monkeypatch.setattr(end_at_once.ray, "is_initialized", lambda: True)
    end_at_once.end_at_once(parse_spec({"name": "taken", "ray": {"address": "auto"}, "models": []}))
    assert forgotten == []
