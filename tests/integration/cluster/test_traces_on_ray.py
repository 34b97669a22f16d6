"""Traces of a cluster's processes: each sends its own spans, and together they are one tree."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import moesaic
from moesaic import Client
from moesaic.actors.runtime.log_lines import is_log_line
from moesaic.cluster.tracing.context import TraceContext
from moesaic.handle import Cluster
from tests.helpers.processes.live import ON_RAY, greedy, running, wait_until
from tests.helpers.tracing.collector import CollectedSpan, Collector, collector, connected
from tests.helpers.tracing.recording import PARENT
from tests.integration.conftest import save_model

pytestmark = [*ON_RAY, pytest.mark.slow]

TOKENS, LAYERS = 4, 2
TRACE, ABOVE = PARENT.trace_id.hex(), PARENT.span_id.hex()
OF_CALL = TraceContext(b"c" * 16, PARENT.span_id)


def whole_trace(server: Collector, trace_id: str, services: int) -> list[CollectedSpan]:
    """The spans of a trace, once those of so many kinds of processes have come."""

    def whole() -> bool:
        spans = server.traces().get(trace_id, [])
        kinds = {span.service for span in spans}
        calls = {span.span_id for span in spans if span.name == "expert call"}
        computed = {span.parent_id for span in spans if span.name == "host compute"}
        return len(kinds) == services and connected(spans, ABOVE) and calls == computed

    wait_until(whole)
    return server.traces()[trace_id]


@pytest.fixture(scope="module")
def server() -> Iterator[Collector]:
    with collector() as found:
        yield found


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, server: Collector) -> Iterator[Cluster]:
    model = save_model(tmp_path_factory.mktemp("traced"), "mixtral")
    spec: dict[str, Any] = {
        "hosts": [{"count": 2, "slots": 16}],
        "network": {"lending": "never"},
        "router": {"port": 0},
        "traces": {"endpoint": server.url, "sample": 0, "slow_layer_ms": 0},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESAIC_LOG", "debug")
        patch.setenv("MOESAIC_LOG_FORMAT", "json")
        patch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-token=of-a-test")
        with running("traced", model, **spec) as cluster:
            patch.undo()
            yield cluster


def test_a_request_is_one_tree_over_all_processes(pool: Cluster, server: Collector) -> None:
    with Client(pool.url or "", traceparent=lambda: PARENT.header) as client:
        client.complete("the quick fox", **greedy("m", TOKENS))
    with Client(pool.url or "") as client:
        client.complete("not sampled", **greedy("m", TOKENS))
    spans = whole_trace(server, TRACE, services=3)
    assert set(server.traces()) == {TRACE}
    names: dict[str, set[str]] = {}
    for span in spans:
        names.setdefault(span.service, set()).add(span.name)
    assert names == {
        "moesaic-ingress": {"POST /v1/completions", "tokenize", "call trunk"},
        "moesaic-trunk": {"generate", "queue", "prefill", "decode", "layer", "expert call"},
        "moesaic-host": {"host queue", "host compute"},
    }
    assert {span.process for span in spans if span.service == "moesaic-host"} == {
        "host-0",
        "host-1",
    }
    assert {headers["x-token"] for headers in server.headers} == {"of-a-test"}
    # The ids are those of the logs, in every process that logs the request.
    texts = [line.text for line in pool.logs(tail=1_000_000)]
    lines = [json.loads(text) for text in texts if is_log_line(text)]
    by_request = [line for line in lines if line.get("trace_id") == TRACE]
    assert {line["process"].partition("-")[0] for line in by_request} == {"ingress", "trunk"}
    named = {line["span_id"] for line in by_request if "span_id" in line}
    assert named
    assert named <= {span.span_id for span in spans}
    by_step = [line for line in lines if TRACE in line.get("trace_ids", ())]
    assert {line["logger"] for line in by_step} >= {
        "actors.engine.step_log",
        "actors.router.call_log",
    }
    others = [line for line in lines if "trace_id" in line or "trace_ids" in line]
    assert len(others) == len([*by_request, *by_step])


def test_a_call_to_the_router_service_has_its_clients_trace(
    pool: Cluster, server: Collector
) -> None:
    import torch

    with moesaic.connect(pool.router or "") as client:
        hidden = client.models()[0].layers[0].hidden
        experts = client.experts("m", 0)
        given = torch.randn(3, hidden), torch.tensor([[0, 1]] * 3), torch.ones(3, 2)
        experts(*given)
        experts(*given, traceparent=OF_CALL.header)
    spans = whole_trace(server, OF_CALL.trace_id.hex(), services=2)
    assert {span.name for span in spans if span.service == "moesaic-router"} == {
        "router call",
        "queue",
        "compute",
        "layer",
        "expert call",
    }
    assert {span.name for span in spans if span.service == "moesaic-host"} == {
        "host queue",
        "host compute",
    }


def test_a_collector_that_is_gone_costs_no_request(pool: Cluster, server: Collector) -> None:
    server.status = 503
    try:
        with Client(pool.url or "", retries=0, traceparent=lambda: PARENT.header) as client:
            for _ in range(3):
                assert client.complete("the quick fox", **greedy("m", TOKENS)).text
    finally:
        server.status = 200


def test_the_spec_names_no_password(tmp_path: Path) -> None:
    from moesaic.proto.errors import SpecError

    with pytest.raises(SpecError, match=r"traces\.endpoint: .* OTEL_EXPORTER"):
        moesaic.up({"models": [], "traces": {"endpoint": "http://user:word@there"}})
