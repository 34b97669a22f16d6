"""Tables of the command line: at 80 columns no heading and no number is cut."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from moesaic.bench import LoadResult, Percentiles
from moesaic.cli import bench, operate, simulate, status, watch
from moesaic.cli.terminal import number

LONG = "Qwen/Qwen3-30B-A3B-Instruct-2507"
TIMES = Percentiles(p50=0.0123, p99=1.2345)
RESULT = LoadResult(
    concurrency=16,
    requests=60,
    unfinished=4,
    errors={"Overloaded": 3},
    seconds=3.0,
    prompt_tokens=1,
    answer_tokens=1,
    answer_tokens_per_s=22866.1,
    first_token_s=TIMES,
    between_tokens_s=TIMES,
)
HOST = {
    "host": "host-0",
    "state": "not answering",
    "device": "cuda:0",
    "experts": 6144,
    "weight_bytes": 2**36,
    "rss_bytes": 2**37,
    "calls": 22_866_123,
    "queued_rows": 16_384,
    "waiting": "waits for a machine with [1] GPU",
}
MODEL = {
    "name": LONG,
    "asleep": True,
    "dtype": "bfloat16",
    "layers": 48,
    "experts": 6144,
    "replicas": 2,
    "missing_experts": 12,
}
STATUS = {
    "name": "local",
    "url": "http://127.0.0.1:8000",
    "models": {LONG: {"running": 16, "waiting": 128, "parked": 3}},
    "cluster": {"hosts": [HOST], "models": [MODEL]},
}
EXPERT = {
    "model": LONG,
    "layer": 47,
    "expert": 127,
    "replicas": [{"host": f"host-{n}", "share": share} for n, share in enumerate((1.0, -1e-9))],
    "choices_per_s": {"10 s": 22866.12, "60 s": -0.0, "600 s": 12.34},
    "layer_part": 0.1234,
    "pinned_to": ["host-1"],
    "least_replicas": 3,
}
CHANGE = {
    "id": 12,
    "who": "balancer",
    "why": "3 replicas of expert 5 of layer 3",
    "phase": "loading",
    "errors": ["no room for 1"],
    "moves": 1200,
    "bytes": 2**36,
    "took_s": None,
    "age_s": 3.2,
    "balancedness_before": 0.8123,
    "balancedness_predicted": 0.98,
    "measured": None,
}
FIGURES = SimpleNamespace(
    way="static",
    balancedness_mean=0.684,
    balancedness_worst=0.451,
    moved_slots=12017,
    moved_bytes=3e12,
    slo_violations=122,
    windows=1440,
    host_hours=1920.5,
    cost=192.5,
    scale_events=12,
)


@pytest.mark.parametrize(
    ("module", "shown", "headings"),
    [
        (
            bench,
            lambda: bench._print([RESULT], 30.0),
            ("streams", "requests", "failed", "tokens/s", "first p50", "next p99", "22,866"),
        ),
        (
            status,
            lambda: status.print_status(STATUS),
            ("experts", "weights", "queue", "replicas", "missing", "waiting", "parked", "16384"),
        ),
        (
            watch,
            lambda: watch._print_experts([EXPERT]),
            ("layer", "expert", "600 s", "of layer", "wishes", "22,866", "(spare)"),
        ),
        (operate, lambda: operate._print_changes([CHANGE]), ("moves", "took", "balance", "1200")),
        (
            simulate,
            lambda: simulate._print_figures([FIGURES]),  # pyright: ignore[reportArgumentType]
            ("SLO missed", "host-h", "scalings", "12,017", "122/1440"),
        ),
    ],
    ids=lambda value: value.__name__.rpartition(".")[2] if hasattr(value, "__file__") else "",
)
@pytest.mark.parametrize("width", [80, 160])
def test_headings_and_numbers_are_whole(
    module: Any,
    shown: Callable[[], None],
    headings: tuple[str, ...],
    width: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("out", "screen"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, Console(highlight=False, width=width))
    shown()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    assert "-0" not in text.replace("host-0", "")
    assert [heading for heading in headings if heading not in text] == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(-0.0, "0.0"), (-0.04, "0.0"), (12.34, "12.3"), (99.96, "100.0"), (22866.1, "22,866")],
)
def test_rates(value: float, text: str) -> None:
    assert number(value) == text
