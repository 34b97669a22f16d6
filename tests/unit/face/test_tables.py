"""Tables of the command line: at 80 columns no heading and no number is cut."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from moesaic.bench import LoadResult, Percentiles
from moesaic.cli import bench, operate, simulate, status, watch
from moesaic.cli.live import top
from moesaic.cli.terminal import number
from moesaic.cluster.reports.activity import AssignmentRates, ExpertReport, ReplicaReport
from moesaic.cluster.reports.placing import ChangePhase, PlanReport, UpkeepReport
from moesaic.cluster.reports.report import Balancedness, HostState, LayerRouting
from moesaic.cluster.reports.status import (
    CardStatus,
    MissingExpert,
    ModelStatus,
    NodeStatus,
    PathStatus,
    RouterServiceState,
    RouterServiceStatus,
    RouterStatus,
    StatusDocument,
    TrainingStatus,
)
from tests.helpers.cluster import reports
from tests.helpers.cluster.metrics import activity
from tests.helpers.cluster.reports import PROCESS, cluster_report, engine_report, host_report

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
    time_to_first_token_s=TIMES,
    inter_token_latency_s=TIMES,
)
HOST = host_report(
    "host-0",
    state=HostState.NOT_ANSWERING,
    obstacle="waits for a machine with [1] GPU",
    process=PROCESS.model_copy(
        update={
            "device": "cuda:0",
            "replicas": 6144,
            "weight_bytes": 2**36,
            "rss_bytes": 2**37,
            "calls": 22_866_123,
            "queued_rows": 16_384,
        }
    ),
)
MODEL = ModelStatus(
    name=LONG,
    path=None,
    dtype="bfloat16",
    min_replicas=2,
    exact=False,
    layers=48,
    experts=6144,
    asleep=True,
    missing_experts=12,
    routing=[
        LayerRouting(
            layer=layer,
            experts=128,
            entropy=entropy,
            max_over_mean=15.9,
            dead_experts=117,
            busiest_expert=127,
            collapsed=collapsed,
        )
        for layer, entropy, collapsed in ((4, 0.2, False), (47, 0.4321, True), (9, 0.9, True))
    ],
)
STATUS = StatusDocument(
    name="local",
    url="http://127.0.0.1:8000",
    monitoring_url="http://127.0.0.1:8002",
    healthy=True,
    engines={
        LONG: engine_report(running_requests=16, waiting_requests=128, parked_requests=3),
    },
    cluster=cluster_report(
        hosts=[HOST, host_report("host-1", process=None)],
        models=[MODEL],
        routers=[
            RouterStatus(
                name="trunk-m",
                placement=None,
                paths=[
                    PathStatus(host="host-0", transport="shm", lent=True, reason=None),
                    PathStatus(host="host-1", transport=None, lent=True, reason=None),
                    PathStatus(host="host-2", transport="grpc", lent=False, reason="it is far"),
                ],
            )
        ],
        router_service=RouterServiceStatus(
            address="127.0.0.1:8001",
            state=RouterServiceState.UNKNOWN,
            error="it said [no]",
            process=None,
        ),
        nodes=[
            NodeStatus(
                node="0123456789abcdef",
                hosts=["host-0", "host-1"],
                weight_bytes=2**30,
                rss_bytes=2**31,
                memory_bytes=2**34,
                free_bytes=2**33,
            )
        ],
        cards=[
            CardStatus(
                card=f"5d1c0a9e{number}0001111222233334444",
                node="0123456789abcdef",
                hosts=["host-0", "host-1"],
                weight_bytes=2**30,
                used_bytes=2**31,
                limit_bytes=limit,
                memory_bytes=2**34,
                free_bytes=2**33,
            )
            for number, limit in enumerate((None, 2**32))
        ],
        training=TrainingStatus(
            run=3,
            model="m",
            initiator="ann",
            age_s=41.0,
            version=12,
            steps=11,
            attempt=2,
            workers=3,
            unprotected_tensors=9,
            owned_tensors={"host-0": 5, "host-1": 4},
            owned_bytes={"host-0": 2**31, "host-1": 2**30},
            step_s=1.234,
            tokens_per_s=4321.0,
            balancedness=Balancedness(mean=0.9612, worst=0.9),
        ),
        missing_experts=1,
        missing_examples=[MissingExpert(model=LONG, layer=1, expert=2, reason="loading")],
    ),
)
EXPERT = ExpertReport(
    model=LONG,
    layer=47,
    expert=127,
    replicas=[ReplicaReport(host=f"host-{n}", share=share) for n, share in enumerate((1.0, -1e-9))],
    assignments_per_s=AssignmentRates(over_10_s=22866.12, over_60_s=-0.0, over_600_s=12.34),
    share_of_layer=0.1234,
    pinned_to=["host-1"],
    min_replicas=3,
)
CHANGE = reports.CHANGE.model_copy(
    update={
        "id": 12,
        "reason": "3 replicas of expert 5 of layer 3",
        "phase": ChangePhase.LOADING,
        "errors": ["no room for 1"],
        "total_moves": 1200,
        "pending_moves": 7,
        "weight_bytes": 2**36,
        "duration_s": None,
        "balancedness_before": Balancedness(mean=0.8123, worst=0.5),
        "balancedness_predicted": Balancedness(mean=0.98, worst=0.9),
    }
)
ACTIVITY = activity().model_copy(
    update={"training": None if STATUS.cluster is None else STATUS.cluster.training}
)
PLAN = PlanReport(
    moves=[],
    drops=[],
    weight_bytes=0,
    expected_s=0.0,
    balancedness_before=Balancedness(mean=0.9, worst=0.8),
    balancedness_after=Balancedness(mean=0.9, worst=0.8),
    layers=[],
    unprotected_experts_before=0,
    unprotected_experts_after=0,
    unplaced_experts=[],
    lacking_bytes=0,
    upkeep=UpkeepReport(model="m", replica_bytes=12 * 2**20, replica_s=0.00315, step_s=2.5),
)
FIGURES = SimpleNamespace(
    strategy="static",
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
            (
                *("experts", "weights", "queue", "replicas", "missing", "waiting", "parked"),
                *("16384", "host-1: computes with their memory", "calls over grpc: it is far"),
                "node 01234567: host-0, host-1 hold 1,024 MiB; 8,192 MiB of 16,384 MiB are free",
                "card 5d1c0a9e0000: host-0, host-1 hold 1,024 MiB and take 2,048 MiB; 8,192",
                "card 5d1c0a9e1000: host-0, host-1 hold 1,024 MiB and take 2,048 MiB of",
                f"{LONG}: worst routing in layer 47: entropy 0.43",
                "117 of 128 experts",
                "run 3 (ann) trains m: version 12 after 11 steps, for 41 s; attempt 2 at",
                "9 trained tensors have a single owner: if that host is lost, the run",
                "run 3: 1.23 s a step, 4,321 tokens/s, balancedness 0.961, worst layer 0.900",
                "tensors that hosts own: host-0 5 (2,048 MiB), host-1 4 (1,024 MiB)",
            ),
        ),
        (
            top,
            lambda: top.out.print(top.frame("local", ACTIVITY)),
            (
                *("owns", "calls/s", "rows/s"),
                "run 3: 1.23 s a step, 4,321 tokens/s, balancedness 0.961, worst layer 0.900",
                "9 trained tensors have a single owner: if that host is lost, the run",
            ),
        ),
        (
            operate,
            lambda: operate._print_plan(PLAN),
            (
                "nothing to move",
                "m is trained: a replica more costs 12.0 MiB and 3.15 ms in each step of 2.5",
            ),
        ),
        (
            watch,
            lambda: watch._print_experts([EXPERT]),
            ("layer", "expert", "600 s", "of layer", "constraints", "22,866", "(spare)"),
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
