"""The spans of slow layers: only these, in the trace of each sampled request of the step."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from moesaic.cluster.tracing.context import TraceContext
from moesaic.cluster.tracing.layers import MOST_REQUESTS, MOST_SENDS, StepTrace
from moesaic.proto.errors import ClusterError
from tests.helpers.tracing.recording import Recording, recording, took_ms


def parent(number: int) -> TraceContext:
    return TraceContext(number.to_bytes(16), number.to_bytes(8))


def stepping(found: Recording, stack: ExitStack, requests: int = 1) -> StepTrace:
    names = [f"r{n}" for n in range(requests)]
    for number, name in enumerate(names, start=1):
        stack.enter_context(found.tracer.request(name, parent(number), "generate"))
    step = found.tracer.step("trunk-m", 7, [*names, "not sampled"])
    assert step is not None
    return step


def test_a_fast_layer_has_no_span_and_is_counted() -> None:
    found = recording(slow_layer_ms=20)
    with ExitStack() as stack:
        step = stepping(found, stack)
        for layer in range(3):
            with step.tracing("m", layer):
                found.wait(19)
    assert found.named("layer") == []
    prefill = found.one("prefill")
    assert prefill.attributes == {
        "moesaic.steps": 1,
        "moesaic.layers": 3,
        "moesaic.layers_ms": 57.0,
    }


def test_a_slow_layer_has_a_span_for_each_call() -> None:
    found = recording(slow_layer_ms=20)
    with ExitStack() as stack:
        step = stepping(found, stack)
        with step.tracing("m", 4):
            layer = step.layer
            assert layer is not None
            first = layer.sent(11, "host-0", rows=3, attempt=0, hedge=False)
            layer.sent(12, "host-1", rows=2, attempt=0, hedge=False)
            found.wait(5)
            layer.answered(12, 1000, 2500)
            found.wait(10)
            layer.refused(11, "Busy")
            layer.sent(13, "host-0", rows=3, attempt=1, hedge=False)
            found.wait(10)
            layer.answered(13, 0, 9000)
        assert step.layer is None
    slow = found.one("layer")
    assert slow.parent_id == found.one("prefill").span_id
    assert took_ms(slow) == 25
    assert slow.attributes == {
        "moesaic.model": "m",
        "moesaic.layer": 4,
        "moesaic.router": "trunk-m",
        "moesaic.step": 7,
        "moesaic.calls": 3,
    }
    calls = found.named("expert call")
    assert {span.parent_id for span in calls} == {slow.span_id}
    assert [(span.attributes["moesaic.host"], took_ms(span), span.error) for span in calls] == [
        ("host-0", 15, "Busy"),
        ("host-1", 5, ""),
        ("host-0", 10, ""),
    ]
    assert calls[0].span_id == first
    assert calls[1].attributes["moesaic.queued_ms"] == 1.0
    assert calls[1].attributes["moesaic.batch_ms"] == 2.5


def test_a_host_that_has_not_answered_may_have_spans_so_their_parent_exists() -> None:
    found = recording(slow_layer_ms=20)
    with ExitStack() as stack:
        step = stepping(found, stack)
        with step.tracing("m", 4):
            assert step.layer is not None
            late = step.layer.sent(1, "host-0", rows=1, attempt=0, hedge=False)
            step.layer.sent(2, "host-1", rows=1, attempt=0, hedge=True)
            step.layer.answered(2, 0, 10)
    first, _ = found.named("expert call")
    assert first.span_id == late
    assert first.attributes["moesaic.answered"] is False


def test_a_layer_that_fails_has_a_span() -> None:
    found = recording(slow_layer_ms=20)
    with ExitStack() as stack:
        step = stepping(found, stack)
        with pytest.raises(ClusterError), step.tracing("m", 4):
            raise ClusterError("closed")
    assert found.one("layer").error == "ClusterError"


def test_each_sampled_request_of_a_step_has_its_layers_with_the_same_ids() -> None:
    found = recording()
    with ExitStack() as stack:
        step = stepping(found, stack, requests=3)
        with step.tracing("m", 0):
            assert step.layer is not None
            assert step.layer.trace_ids == [parent(n).trace_id for n in (1, 2, 3)]
            step.layer.sent(1, "host-0", rows=3, attempt=0, hedge=False)
            step.layer.answered(1, 0, 0)
    for name in ("layer", "expert call"):
        spans = found.named(name)
        assert [span.trace_id for span in spans] == [parent(n).trace_id for n in (1, 2, 3)]
        assert len({span.span_id for span in spans}) == 1
    owners = {span.trace_id: span.span_id for span in found.named("prefill")}
    assert all(span.parent_id == owners[span.trace_id] for span in found.named("layer"))


def test_choices_of_one_request_have_a_layer_once_in_their_trace() -> None:
    found = recording()
    with ExitStack() as stack:
        for name in ("r-0", "r-1"):
            stack.enter_context(found.tracer.request(name, parent(1), "generate"))
        step = found.tracer.step("trunk-m", 1, ["r-0", "r-1"])
        assert step is not None
        with step.tracing("m", 0):
            assert step.layer is not None
            assert step.layer.trace_ids == [parent(1).trace_id]
    assert len(found.named("layer")) == 1
    assert [span.attributes["moesaic.layers"] for span in found.named("prefill")] == [1, 1]


def test_a_request_has_no_more_layers_than_the_limit() -> None:
    found = recording(layers_per_request=2)
    with ExitStack() as stack:
        step = stepping(found, stack)
        named = []
        for layer in range(5):
            with step.tracing("m", layer):
                assert step.layer is not None
                named.append(len(step.layer.trace_ids))
    assert named == [1, 1, 0, 0, 0], "hosts make no spans for a request that has enough"
    assert len(found.named("layer")) == 2
    assert found.one("generate").attributes["moesaic.layers_left_out"] == 3


def test_a_step_and_a_call_are_bounded() -> None:
    found = recording()
    with ExitStack() as stack:
        step = stepping(found, stack, requests=MOST_REQUESTS + 2)
        with step.tracing("m", 0):
            assert step.layer is not None
            assert len(step.layer.trace_ids) == MOST_REQUESTS
            for seq in range(MOST_SENDS + 5):
                step.layer.sent(seq, "host-0", rows=1, attempt=seq, hedge=False)
                step.layer.refused(seq, "Busy")
    assert len(found.named("layer")) == MOST_REQUESTS
    assert len(found.named("expert call")) == MOST_REQUESTS * MOST_SENDS
    assert len(found.named("prefill")) == MOST_REQUESTS + 2


def test_a_step_without_sampled_requests_has_no_trace() -> None:
    found = recording()
    assert found.tracer.step("trunk-m", 1, ["a", "b"]) is None
