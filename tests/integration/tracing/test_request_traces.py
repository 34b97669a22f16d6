"""A sampled request has one connected trace, from HTTP to the hosts; others have nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from moesaic.actors.router.connections import HostConnections
from moesaic.actors.tracing import process_tracer
from moesaic.actors.tracing.process_tracer import begin_tracing, end_tracing, trace_counts, tracer
from moesaic.cluster.expert_keys import ExpertKey, LayerKey
from moesaic.cluster.tracing.layers import MOST_REQUESTS
from moesaic.cluster.tracing.settings import TraceSettings
from moesaic.proto.expert_pb2 import Frame, Trace
from tests.helpers.pool.host_calls import ask as call_host
from tests.helpers.pool.router_services import router_service
from tests.helpers.pool.served_pool import ServedPool, held, save_served_model, served_pool
from tests.helpers.pool.serving import KEY, inputs, save_model, serving
from tests.helpers.pool.transports import settles
from tests.helpers.processes.logged import logged, of
from tests.helpers.tracing.collector import CollectedSpan, Collector, collector, connected
from tests.helpers.tracing.recording import PARENT, recording, traced
from tests.integration.router.test_missing_expert import without_experts

TOKENS, LAYERS = 4, 2
CLIENT = PARENT.header
NOT_SAMPLED = CLIENT[:-1] + "0"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPool]:
    with served_pool(save_served_model(tmp_path_factory.mktemp("model"))) as pool:
        yield pool


@pytest.fixture
def server() -> Iterator[Collector]:
    with collector() as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    end_tracing()
    assert tracer() is None


def begin(server: Collector, **settings: Any) -> None:
    """Trace in this process, which has all roles."""
    given = {"endpoint": server.url, "sample": 0.0, "slow_layer_ms": 0.0} | settings
    begin_tracing(TraceSettings(**given), "test", "all", "cluster")


def ask(
    served: ServedPool, *, headers: dict[str, str] | None = None, **more: Any
) -> httpx.Response:
    asked = {"model": "m", "prompt": "to be", "max_tokens": TOKENS, "temperature": 0, **more}
    answer = served.http.post("/v1/completions", json=asked, headers=headers or {})
    assert answer.status_code == 200, answer.text
    return answer


def trace_of(server: Collector, trace_id: str) -> list[CollectedSpan]:
    """All spans of a trace, once its root has arrived."""
    assert server.has(trace_id, "POST /v1/completions")
    return server.traces()[trace_id]


def named(spans: list[CollectedSpan], name: str) -> list[CollectedSpan]:
    return [span for span in spans if span.name == name]


def test_a_request_has_one_connected_trace_from_http_to_the_hosts(
    served: ServedPool, server: Collector
) -> None:
    begin(server, sample=1.0)
    answer = ask(served)
    trace_id = answer.headers["x-trace-id"]
    spans = trace_of(server, trace_id)
    assert connected(spans)
    by_id = {span.span_id: span for span in spans}

    def above(name: str) -> set[str]:
        return {by_id[span.parent_id].name if span.parent_id else "" for span in named(spans, name)}

    assert above("POST /v1/completions") == {""}
    assert above("tokenize") == {"POST /v1/completions"}
    assert above("call trunk") == {"POST /v1/completions"}
    assert above("generate") == {"call trunk"}
    for stage in ("queue", "prefill", "decode"):
        assert above(stage) == {"generate"}
        assert len(named(spans, stage)) == 1
    assert above("layer") <= {"prefill", "decode"}
    assert above("expert call") == {"layer"}
    assert above("host queue") == above("host compute") == {"expert call"}
    layers = named(spans, "layer")
    assert {span.about["moesaic.layer"] for span in layers} == set(range(LAYERS))
    assert len(layers) >= LAYERS * TOKENS
    for call in named(spans, "expert call"):
        inside = [span.name for span in spans if span.parent_id == call.span_id]
        assert sorted(inside) == ["host compute", "host queue"]
        hosts = {s.about["moesaic.host"] for s in spans if s.parent_id == call.span_id}
        assert hosts == {call.about["moesaic.host"]}
    for span in spans:
        assert span.start_ns <= span.end_ns
    root = named(spans, "POST /v1/completions")[0]
    assert root.about["http.response.status_code"] == 200
    assert root.about["moesaic.request_id"] == answer.headers["x-request-id"]
    assert named(spans, "decode")[0].about["moesaic.tokens"] == TOKENS
    assert all(root.start_ns <= span.start_ns <= span.end_ns <= root.end_ns for span in spans)


def test_a_clients_trace_goes_on(served: ServedPool, server: Collector) -> None:
    begin(server)
    answer = ask(served, headers={"traceparent": CLIENT})
    trace_id = PARENT.trace_id.hex()
    assert answer.headers["x-trace-id"] == trace_id
    assert connected(trace_of(server, trace_id), above=PARENT.span_id.hex())


@pytest.mark.parametrize("header", [None, NOT_SAMPLED, "00-nonsense"])
def test_a_request_that_is_not_sampled_leaves_nothing(
    served: ServedPool, server: Collector, header: str | None
) -> None:
    begin(server)
    with logged() as log:
        answer = ask(served, headers={} if header is None else {"traceparent": header})
    assert "x-trace-id" not in answer.headers
    end_tracing()
    assert server.spans == []
    assert "trace_id" not in log.text


def test_the_ids_are_those_of_the_logs(served: ServedPool, server: Collector) -> None:
    begin(server, sample=1.0)
    with logged() as log:
        answer = ask(served, headers={"x-request-id": "both"})
        ask(served, headers={"x-request-id": "other", "traceparent": NOT_SAMPLED})
    trace_id = answer.headers["x-trace-id"]
    spans = trace_of(server, trace_id)
    edge = of(log.lines, "actors.endpoint.http.edge", request_id="both")
    assert len(edge) == 2
    (root,) = named(spans, "POST /v1/completions")
    assert {(line["trace_id"], line["span_id"]) for line in edge} == {(trace_id, root.span_id)}
    steps = [one for one in of(log.lines, "actors.engine.step_log") if "both-0" in one["requests"]]
    assert len(steps) >= TOKENS
    assert {tuple(line["trace_ids"]) for line in steps} == {(trace_id,)}
    routed = [line for line in of(log.lines, "actors.router.call_log") if "trace_ids" in line]
    assert {tuple(line["trace_ids"]) for line in routed} == {(trace_id,)}
    layers = {
        (span.about["moesaic.step"], span.about["moesaic.layer"]) for span in named(spans, "layer")
    }
    assert layers == {(line["step"], line["layer"]) for line in routed}
    other = [line for line in log.lines if line.get("request_id") == "other"]
    assert other
    assert not any("trace_id" in line for line in other)


def test_requests_that_share_steps_have_a_whole_trace_each(
    served: ServedPool, server: Collector
) -> None:
    begin(server, sample=1.0, layers_per_request=1000)
    with ThreadPoolExecutor(3) as threads:
        answers = list(threads.map(lambda _: ask(served, max_tokens=12), range(3)))
    found = [trace_of(server, answer.headers["x-trace-id"]) for answer in answers]
    assert len({spans[0].trace_id for spans in found}) == 3
    for spans in found:
        assert connected(spans)
        assert len(named(spans, "layer")) >= LAYERS * 12
    shared = [{span.span_id for span in named(spans, "layer")} for spans in found]
    assert shared[0] & shared[1] or shared[1] & shared[2] or shared[0] & shared[2]


def test_only_slow_layers_have_spans_and_hosts_follow(
    served: ServedPool, server: Collector
) -> None:
    begin(server, sample=1.0, slow_layer_ms=300.0)
    fast = ask(served).headers["x-trace-id"]
    layer = 1
    host = served.holder(ExpertKey("m", layer, 0))
    with ThreadPoolExecutor(1) as thread, held(host) as go_on:
        asked = thread.submit(ask, served)
        assert settles(lambda: host._loop is not None and bool(served.pool.router._shell.running))
        time.sleep(0.4)  # what is measured is the time itself
        go_on()
        slow = asked.result(30).headers["x-trace-id"]
    assert {span.name for span in trace_of(server, fast)} == {
        "POST /v1/completions",
        "tokenize",
        "call trunk",
        "generate",
        "queue",
        "prefill",
        "decode",
    }
    spans = trace_of(server, slow)
    assert connected(spans)
    assert 1 <= len(named(spans, "layer")) < LAYERS * TOKENS
    assert all(span.end_ns - span.start_ns >= 300e6 for span in named(spans, "layer"))
    assert {span.about["moesaic.host"] for span in named(spans, "host queue")} <= {host.name}


def test_choices_and_embeddings_are_parts_of_one_trace(
    served: ServedPool, server: Collector
) -> None:
    begin(server, sample=1.0)
    spans = trace_of(server, ask(served, n=2, max_tokens=2).headers["x-trace-id"])
    assert connected(spans)
    assert len(named(spans, "generate")) == 2
    answer = served.http.post("/v1/embeddings", json={"model": "m", "input": "to be"})
    assert answer.status_code == 200, answer.text
    trace_id = answer.headers["x-trace-id"]
    assert server.has(trace_id, "POST /v1/embeddings")
    names = {span.name for span in server.traces()[trace_id]}
    assert names == {"POST /v1/embeddings", "tokenize", "embed"}


def test_a_request_that_waits_for_an_expert_shows_it(served: ServedPool, server: Collector) -> None:
    begin(server, sample=1.0)
    every = [{"model": "m", "prompt": [token], "max_tokens": 8} for token in range(3, 9)]
    with ThreadPoolExecutor(len(every)) as threads:
        with without_experts(served, 0):
            asked = [threads.submit(served.http.post, "/v1/completions", json=one) for one in every]
            assert settles(lambda: served.engine.stats().parked > 0)
        answers = [one.result(30) for one in asked]
    assert {answer.status_code for answer in answers} == {200}
    found = [trace_of(server, answer.headers["x-trace-id"]) for answer in answers]
    assert all(map(connected, found))
    (waited, *_) = [spans for spans in found if named(spans, "expert wait")]
    assert len(named(waited, "queue")) == len(named(waited, "expert wait")) + 1
    (decode,) = named(waited, "decode")[-1:]
    assert max(span.end_ns for span in named(waited, "expert wait")) <= decode.start_ns
    assert tracer_is_idle()


def test_who_leaves_early_leaves_nothing_behind(served: ServedPool, server: Collector) -> None:
    begin(server, sample=1.0)
    asked = {"model": "m", "prompt": "to be", "max_tokens": 200, "stream": True}
    with served.http.stream("POST", "/v1/completions", json=asked) as answer:
        next(answer.iter_lines())
        trace_id = answer.headers["x-trace-id"]
    assert settles(tracer_is_idle)
    spans = trace_of(server, trace_id)
    assert connected(spans)
    assert named(spans, "generate")[0].error == ""


def tracer_is_idle() -> bool:
    here = tracer()
    return here is not None and not here.busy and not here.computes


def test_a_request_that_fails_says_why(served: ServedPool, server: Collector) -> None:
    begin(server, sample=1.0)
    wrong = served.http.post("/v1/completions", json={"model": "absent", "prompt": "x"})
    assert wrong.status_code == 404
    spans = trace_of(server, wrong.headers["x-trace-id"])
    assert spans[0].about["http.response.status_code"] == 404
    assert spans[0].error == ""
    served.http.get("/nowhere/secret-path")
    end_tracing()
    assert not any("secret" in str(span) for span in server.spans)


def test_probes_are_never_traced(served: ServedPool, server: Collector) -> None:
    begin(server, sample=1.0)
    assert "x-trace-id" not in served.http.get("/livez").headers
    end_tracing()
    assert server.spans == []


def test_a_client_of_the_router_service_has_its_trace(tmp_path: Path, server: Collector) -> None:
    begin(server, sample=1.0)
    with router_service(save_model(tmp_path)) as service:
        client = service.client()
        given = inputs(5)
        experts = client.experts("m", 1)
        untraced = experts(*given)
        traced_out = experts(*given, traceparent=CLIENT)
        torch.testing.assert_close(untraced, traced_out)
        trace_id = PARENT.trace_id.hex()
        assert server.has(trace_id, "router call")
    assert set(server.traces()) == {trace_id}, "no trace begins at the service"
    spans = server.traces()[trace_id]
    assert connected(spans, above=PARENT.span_id.hex())
    assert {span.name for span in spans} == {
        "router call",
        "queue",
        "compute",
        "layer",
        "expert call",
        "host queue",
        "host compute",
    }


def test_a_collector_that_is_down_or_hangs_loses_no_request(
    served: ServedPool, server: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_tracer, "MOST_WAITING", 50)
    text = ask(served).json()["choices"][0]["text"]
    begin(server, sample=1.0)
    server.answers.clear()  # it takes requests and does not answer
    for _ in range(4):
        assert ask(served).json()["choices"][0]["text"] == text
    counts = trace_counts()
    assert counts is not None
    assert counts.spans.waiting <= 50
    assert counts.spans.dropped > 0
    assert counts.passed_over == 0
    server.answers.set()
    end_tracing()
    begin(replace(server, url="http://127.0.0.1:1"), sample=1.0)
    for _ in range(2):
        assert ask(served).json()["choices"][0]["text"] == text


def test_calls_that_are_not_sampled_carry_nothing(
    served: ServedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames: list[Frame] = []
    send = HostConnections.send_call

    def noting(self: HostConnections, host: str, frame: Frame, *rest: Any) -> None:
        frames.append(frame)
        send(self, host, frame, *rest)

    monkeypatch.setattr(HostConnections, "send_call", noting)
    with traced(recording(sample=0.0)):
        ask(served)
    assert frames
    assert not any(frame.call.HasField("trace") for frame in frames)
    frames.clear()
    with traced(recording(sample=1.0)):
        ask(served)
    assert all(len(frame.call.trace.trace_ids) == 1 for frame in frames)


def test_a_layer_that_is_not_traced_makes_nothing(served: ServedPool) -> None:
    batch = served.pool.router.batch
    with traced(recording(sample=0.0)):
        ask(served)
        assert batch.tracing(LayerKey("m", 0)) is batch.tracing(LayerKey("m", 1))
        assert batch.layer_trace is None


def test_a_layer_that_the_trunk_computes_itself_has_a_span_without_calls(tmp_path: Path) -> None:
    with serving(save_model(tmp_path), lends=True) as pool, traced() as found:
        router = pool.router(borrows=True)
        router.batch.log_step = lambda name, step: found.tracer.step(name, step, ["r"])
        given = inputs(5)
        assert settles(lambda: router.compute_all(KEY, *given) is not None)
        with found.tracer.request("r", PARENT, "generate"):
            router.begin_step()
            router.forward(KEY, *given)
            router.end_step()
        layer = found.one("layer")
        assert layer.attributes["moesaic.calls"] == 0
        assert found.named("expert call") == []


def test_ids_that_are_none_are_ignored_by_a_host(served: ServedPool) -> None:
    with traced() as found:
        for trace in (
            Trace(trace_ids=[b"short"], span_id=b"12345678"),
            Trace(trace_ids=[b"t" * 16], span_id=b"short"),
            Trace(),
        ):
            reply, _ = call_host(served, "shm", trace=trace)
            assert reply.seq == 1
        assert found.spans == []
        many = Trace(trace_ids=[bytes([n]) * 16 for n in range(1, 40)], span_id=b"12345678")
        call_host(served, "grpc", trace=many)
        assert len(found.named("host compute")) == MOST_REQUESTS
