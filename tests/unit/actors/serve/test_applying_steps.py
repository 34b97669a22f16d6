"""The steps in which a cluster follows another spec; Ray and Serve are not there."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from moesaic.actors.router_service.service_actor import service_part
from moesaic.actors.serve import applying, launch
from moesaic.actors.serve.applying import PlannedChange, carry_out, plan_change
from moesaic.actors.serve.replica.ingress_plan import fixed_part
from moesaic.actors.serve.serve_border import ServeState
from moesaic.actors.serve.trunk_apps import trunk_version
from moesaic.actors.store.durable_state import INGRESS_PART, SERVICE_PART
from moesaic.cluster.placement import ModelRef
from moesaic.cluster.spec.deployment import DeployedModel, Deployment, PlacedEndpoint, version_of
from moesaic.cluster.spec.monitoring import MonitoringSpec
from moesaic.cluster.spec.spec import Spec, parse_spec
from tests.helpers.cluster.control_world import shape

MODELS = [{"name": "m", "path": "/m"}]


def quiet(*_: Any, **__: Any) -> None:
    pass


def spec_of(**values: Any) -> Spec:
    return parse_spec({"models": MODELS} | values)


def deployed(spec: Spec) -> list[DeployedModel]:
    return [
        DeployedModel(
            ref=ModelRef(name=one.name, dtype=one.dtype, path=one.path),
            shape=shape(one.name, replicas=one.replicas),
            top_k=2,
        )
        for one in spec.models
    ]


def deployment(**values: Any) -> Deployment:
    spec = spec_of(**values)
    watched = MonitoringSpec(port=9100) if spec.monitoring is not None else None
    return Deployment(
        id="1",
        spec=spec,
        models=deployed(spec),
        groups=dict(enumerate(spec.hosts)),
        order=list(range(len(spec.hosts))),
        endpoint=PlacedEndpoint(
            host="127.0.0.1",
            url="http://127.0.0.1:8000",
            monitoring=watched,
            monitoring_url=watched and "http://127.0.0.1:9100",
        ),
        router="127.0.0.1:8001" if spec.router is not None else None,
    ).as_stored


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plan a change without a machine to look at."""
    monkeypatch.setattr(applying, "find_serve", lambda: None)
    monkeypatch.setattr(applying, "prepare", lambda spec, *_, **__: deployed(spec))
    parts: dict[str, str] = {}

    def plan(before: Deployment, **values: Any) -> PlannedChange:
        if not parts:  # the parts that run are those of the first deployment
            parts[INGRESS_PART] = version_of(fixed_part(before))
            if before.router is not None:
                parts[SERVICE_PART] = version_of(service_part(before))
        monkeypatch.setattr(applying, "noted_part", lambda _, part: parts.get(part))
        return plan_change(before, spec_of(**values), quiet, quiet)

    return plan


def test_a_group_that_goes_restarts_nothing_whatever_its_place(planned: Any) -> None:
    three = [{"count": 1, "threads": n} for n in (1, 2, 3)]
    before = deployment(hosts=three)
    assert planned(before, hosts=three[:2]).report.restarts == []
    assert planned(before, hosts=[three[0], three[2]]).report.restarts == []


def test_the_same_spec_again_finishes_what_an_interrupted_apply_left(planned: Any) -> None:
    """`apply` was killed when the controller had stored the change, and nothing else was done."""
    before = deployment(router={})
    wanted = {"router": {"call_s": 5.0}, "endpoint": {"cors_origins": ["http://a.example"]}}
    change = planned(before, **wanted)
    assert change.new_ingress
    assert change.new_service
    again = planned(change.after, **wanted)
    assert again.new_ingress, "the ingress still has its first origins"
    assert again.new_service, "the router service still has its first limits"


def test_a_router_service_that_is_new_starts_also_if_a_model_is_replaced(
    monkeypatch: pytest.MonkeyPatch, planned: Any
) -> None:
    done: list[str | None] = []
    controller = SimpleNamespace(
        status=SimpleNamespace(
            remote=lambda: SimpleNamespace(scaling=SimpleNamespace(leaving_hosts=[]))
        )
    )
    monkeypatch.setattr(applying, "_step", quiet)
    monkeypatch.setattr(applying, "forget_start_failures", quiet)
    monkeypatch.setattr(applying, "_wait_forgotten", quiet)
    monkeypatch.setattr(applying, "wait_loaded", quiet)
    monkeypatch.setattr(applying, "wait_endpoint", quiet)
    monkeypatch.setattr(applying, "controller_of", lambda _: controller)
    monkeypatch.setattr(applying, "ray_get", lambda found, *_: found)
    monkeypatch.setattr(applying, "restart_router_service", lambda after: done.append(after.router))
    change = planned(
        deployment(), models=[{"name": "m", "path": "/another"}], router={"port": 8001}
    )
    assert change.replaced == {"m"}
    carry_out(change, "test", quiet)
    assert done == ["127.0.0.1:8001"]


def test_monitoring_keeps_its_port_when_something_else_of_it_changes(
    monkeypatch: pytest.MonkeyPatch, planned: Any
) -> None:
    """The port is taken: by the ingress that runs."""
    import socket

    from moesaic.actors.serve import serve_border

    monkeypatch.setattr(serve_border, "is_head_node", lambda: True)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        before = deployment(monitoring={"port": port})
        assert before.endpoint is not None
        place = replace(before.endpoint, monitoring=MonitoringSpec(port=port))
        before = replace(before, endpoint=place)
        change = planned(before, monitoring={"port": port, "hot_experts": 3})
    assert change.after.endpoint.monitoring.port == port


def test_all_models_may_sleep_while_the_cluster_follows_a_spec(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hosts are to hold nothing then."""
    controller = SimpleNamespace(
        desired=SimpleNamespace(remote=list), progress=SimpleNamespace(remote=lambda: (0, 0, ""))
    )
    monkeypatch.setattr(launch, "ray_get", lambda found, *_: found)
    spec = spec_of(models=[MODELS[0] | {"idle_s": 1.0}], timeouts={"start_s": 1.0})
    launch.wait_loaded(spec, "n", controller, quiet)


def test_the_environment_of_whoever_applies_restarts_no_trunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The version that Serve has was made by whoever started the cluster."""
    there = deployment()
    monkeypatch.delenv("MOESAIC_LOG", raising=False)
    before = trunk_version(there, there.models[0].ref)
    monkeypatch.setenv("MOESAIC_LOG", "debug")
    assert trunk_version(there, there.models[0].ref) == before


def test_serve_says_under_which_path_it_serves_a_second_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.serve.config import HTTPOptions

    from moesaic.actors.serve import serve_border

    http = HTTPOptions(host="127.0.0.1", port=8000)
    # The application of the cluster that Serve is building has no route before it is built.
    state = ServeState(http, None, {"moesaic-one": "/", "moesaic-two": "/two"})
    monkeypatch.setattr(serve_border, "find_serve", lambda: state)
    assert serve_border.serve_address("moesaic-two").prefix == "/two"


# ---- the Serve and the Ray that others use ------------------------------------------------------


def test_an_application_that_serve_is_building_is_no_orphan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its controller starts when its models have been downloaded, which takes minutes."""
    from ray.serve.config import HTTPOptions

    from moesaic.actors.serve import serve_border

    ended: list[str] = []
    routes: dict[str, str | None] = {"moesaic-old": "/", "moesaic-new": None}
    state = ServeState(HTTPOptions(), None, routes, frozenset({"moesaic-new"}))
    monkeypatch.setattr(serve_border, "find_serve", lambda: state)
    monkeypatch.setattr(serve_border, "_has_controller", lambda _: False)
    monkeypatch.setattr(serve_border, "_end_idle_serve", quiet)
    monkeypatch.setattr(serve_border, "end_apps", lambda apps, *_: ended.extend(apps))
    serve_border._end_orphans()
    assert ended == ["moesaic-old"]


def test_a_ray_without_the_cluster_is_left_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise `up` in the same program would start the cluster there."""
    import ray

    from moesaic.actors.serve import found

    joined: list[str] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: bool(joined))
    monkeypatch.setattr(ray, "shutdown", joined.clear)
    monkeypatch.setattr(found, "join", lambda address, **_: joined.append(address))
    monkeypatch.setattr(found, "others_on_ray", lambda _: ["another"])
    assert found.find_cluster("mine") is None
    assert not joined


def test_a_cluster_that_begins_anew_has_other_trunks() -> None:
    """Trunks that its predecessor has left have another secret, and another controller."""
    there = deployment()
    later = replace(there, id="2")
    ref = there.models[0].ref
    assert trunk_version(later, ref) != trunk_version(there, ref)
