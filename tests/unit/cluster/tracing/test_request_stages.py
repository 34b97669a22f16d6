"""The spans of one request: its stages one after the other, bounded, and right when it fails."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.cluster.tracing.stages import MOST_STAGES, RequestTrace
from moesaic.cluster.tracing.tracer import MOST_REQUESTS
from moesaic.proto.errors import ExpertUnavailable
from tests.helpers.tracing.recording import PARENT, Recording, recording, took_ms


def stages_of(found: Recording) -> list[tuple[str, float]]:
    return [(span.name, took_ms(span)) for span in found.spans if span.name != "generate"]


def test_the_stages_of_an_answer() -> None:
    found = recording()
    with found.tracer.request("r", PARENT, "generate", {"moesaic.prompt_tokens": 3}) as request:
        assert request is not None
        found.wait(5)
        request.step()
        found.wait(20)
        request.tokens(1)
        for _ in range(3):
            request.step()
            found.wait(10)
            request.tokens(1)
    assert stages_of(found) == [("queue", 5), ("prefill", 20), ("decode", 30)]
    whole = found.one("generate")
    assert (whole.parent_id, whole.trace_id) == (PARENT.span_id, PARENT.trace_id)
    assert whole.attributes == {"moesaic.request_id": "r", "moesaic.prompt_tokens": 3}
    assert took_ms(whole) == 55
    assert {span.parent_id for span in found.spans if span is not whole} == {whole.span_id}
    assert found.one("prefill").attributes == {"moesaic.steps": 1}
    assert found.one("decode").attributes == {"moesaic.steps": 3, "moesaic.tokens": 4}
    assert not any(span.error for span in found.spans)


def test_a_request_that_waits_for_an_expert_is_computed_anew() -> None:
    found = recording()
    with found.tracer.request("r", PARENT, "generate") as request:
        assert request is not None
        request.step()
        found.wait(4)
        request.parked()
        found.wait(100)
        request.unparked()
        found.wait(1)
        request.step()
        found.wait(7)
        request.tokens(1)
    names = ["queue", "prefill", "expert wait", "queue", "prefill", "decode"]
    assert [name for name, _ in stages_of(found)] == names
    assert dict(stages_of(found))["expert wait"] == 100


def test_an_error_ends_all_and_is_named() -> None:
    found = recording()
    with (
        pytest.raises(ExpertUnavailable),
        found.tracer.request("r", PARENT, "generate") as request,
    ):
        assert request is not None
        request.parked()
        raise ExpertUnavailable("none")
    assert found.one("generate").error == "ExpertUnavailable"
    assert found.one("expert wait").end_ns
    assert not found.tracer.busy
    assert not found.tracer.computes


def test_who_leaves_is_no_error() -> None:
    found = recording()
    with pytest.raises(GeneratorExit), found.tracer.request("r", PARENT, "generate"):
        raise GeneratorExit
    assert found.one("generate").error == ""


def test_what_comes_after_the_end_changes_nothing() -> None:
    found = recording()
    with found.tracer.request("r", PARENT, "generate") as request:
        pass
    assert request is not None
    before = list(found.spans)
    request.step()
    request.tokens(1)
    request.parked()
    request.end("late")
    assert found.spans == before


@given(st.lists(st.sampled_from(["step", "tokens", "parked", "unparked", "layer"]), max_size=300))
def test_any_order_gives_a_bounded_tree(events: list[str]) -> None:
    found = recording(layers_per_request=5)
    with found.tracer.request("r", PARENT, "generate") as request:
        assert request is not None
        slow = 0
        for event in events:
            found.wait(1)
            if event == "tokens":
                request.tokens(1)
            elif event == "layer":
                slow += request.layer(1_000_000, slow=True) is not None
            else:
                getattr(request, event)()
    assert slow <= 5
    whole = found.spans[-1]
    assert whole.name == "generate"
    assert all(span.parent_id == whole.span_id for span in found.spans[:-1])
    assert len(found.spans) <= MOST_STAGES + 1
    ends = [(span.start_ns, span.end_ns) for span in found.spans[:-1]]
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    left_out = whole.attributes.get("moesaic.layers_left_out", 0)
    assert slow + int(left_out) == events.count("layer")


def test_the_parent_that_a_client_names_decides() -> None:
    found = recording(sample=0.0)
    sampled = PARENT.header
    assert found.tracer.parent_of([sampled]) == PARENT
    assert found.tracer.parent_of([sampled[:-1] + "0"]) is None
    assert found.tracer.parent_of([]) is None
    everything = recording(sample=1.0)
    assert everything.tracer.parent_of([sampled[:-1] + "0"]) is None
    begun = everything.tracer.parent_of(["nonsense"])
    assert begun is not None
    assert begun.span_id == b""
    assert everything.tracer.given_parent(["nonsense"]) is None


def test_a_client_is_not_followed_where_the_spec_says_so() -> None:
    found = recording(sample=1.0, follow_clients=False)
    begun = found.tracer.parent_of([PARENT.header])
    assert begun is not None
    assert begun.trace_id != PARENT.trace_id
    assert found.tracer.given_parent([PARENT.header]) is None


def test_no_more_requests_are_traced_at_a_time_than_the_limit() -> None:
    found = recording()
    opened = [found.tracer.span(str(n), PARENT, "x") for n in range(MOST_REQUESTS)]
    for one in opened:
        one.__enter__()
    with (
        found.tracer.span("more", PARENT, "x") as span,
        found.tracer.request("r", PARENT, "y") as r,
    ):
        assert span is None
        assert r is None
    assert found.tracer.passed_over == 2
    for one in opened:
        one.__exit__(None, None, None)
    with found.tracer.span("again", PARENT, "x") as span:
        assert span is not None
    assert not found.tracer.busy


def test_two_requests_with_one_id_end_apart() -> None:
    found = recording()
    with found.tracer.request("r", PARENT, "generate") as first:
        with found.tracer.request("r", PARENT, "generate") as second:
            assert found.tracer.following("r") is second
        assert isinstance(first, RequestTrace)
    assert len(found.named("generate")) == 2
    assert not found.tracer.busy
