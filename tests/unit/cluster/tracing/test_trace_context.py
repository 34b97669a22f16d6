"""The `traceparent` header as the W3C defines it, and the share of new traces that is sampled."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.cluster.tracing.context import TraceContext, is_sampled, parse_traceparent

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"


def ids(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size).filter(any)


@given(ids(16), ids(8), st.booleans())
def test_what_is_written_is_read(trace_id: bytes, span_id: bytes, sampled: bool) -> None:
    context = TraceContext(trace_id, span_id, sampled)
    assert parse_traceparent([context.header]) == context


@given(st.text(max_size=80))
def test_no_text_is_an_error(text: str) -> None:
    assert parse_traceparent([text]) is None


@given(st.integers(0, len(GOOD) - 1), st.characters(codec="utf-8"))
def test_one_wrong_character_makes_it_invalid(at: int, other: str) -> None:
    changed = GOOD[:at] + other + GOOD[at + 1 :]
    if other not in "0123456789abcdef" and changed != GOOD:
        assert parse_traceparent([changed]) is None


@pytest.mark.parametrize(
    "header",
    [
        "",
        "00",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{SPAN}-01",
        f"{GOOD}-more",
        f"{GOOD}.more",
        f"01-{TRACE}-{SPAN}-01more",
        f"{GOOD}\n",
    ],
)
def test_an_invalid_header_is_none_at_all(header: str) -> None:
    assert parse_traceparent([header]) is None


def test_two_headers_are_none_at_all() -> None:
    assert parse_traceparent([GOOD, GOOD]) is None
    assert parse_traceparent([]) is None


@pytest.mark.parametrize("header", [f"01-{TRACE}-{SPAN}-01", f"cc-{TRACE}-{SPAN}-09-what-comes"])
def test_a_later_version_is_read_as_far_as_it_is_known(header: str) -> None:
    assert parse_traceparent([header]) == TraceContext(
        bytes.fromhex(TRACE), bytes.fromhex(SPAN), True
    )


@pytest.mark.parametrize(("flags", "sampled"), [("00", False), ("01", True), ("02", False)])
def test_the_first_flag_says_whether_it_is_sampled(flags: str, sampled: bool) -> None:
    found = parse_traceparent([f"00-{TRACE}-{SPAN}-{flags}"])
    assert found is not None
    assert found.sampled is sampled


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_the_share_of_new_traces(share: float) -> None:
    source = random.Random(7)
    found = sum(is_sampled(source.randbytes(16), share) for _ in range(20_000))
    assert found == pytest.approx(share * 20_000, abs=200)


@given(ids(16), st.floats(0, 1), st.floats(0, 1))
def test_who_samples_more_samples_the_same_ones_too(
    trace_id: bytes, one: float, other: float
) -> None:
    less, more = sorted((one, other))
    assert is_sampled(trace_id, more) or not is_sampled(trace_id, less)
