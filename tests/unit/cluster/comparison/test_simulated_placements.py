"""Placements side by side on the same loads, and `moesaic simulate` around them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moesaic.actors.simulator.world import KeyValueStore, run_seed
from moesaic.cli.main import main
from moesaic.cluster.comparison.compare import (
    StrategyResult,
    compare,
    control_policy,
    host_speed,
    pool_of,
    shifting_day,
)
from moesaic.cluster.comparison.elastic_placement import Elastic
from moesaic.cluster.comparison.loads import daily_trace, drifting_trace
from moesaic.cluster.comparison.placement_strategies import Eplb, Static
from moesaic.cluster.comparison.queues import Queues
from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.load.trace import Trace
from moesaic.cluster.placement import ModelShape
from moesaic.traces import write_trace

SHAPE = ModelShape(model="m", experts={0: 16, 1: 16}, expert_bytes=1_000_000)
WINDOW_S = 60.0


def loads(windows: int = 12, drift: float = 0.2) -> Trace:
    return drifting_trace(
        [SHAPE],
        sigma=1.0,
        drift=drift,
        windows=windows,
        window_s=WINDOW_S,
        assignments_per_s=1000.0,
        rng=np.random.default_rng(0),
    )


def pool(trace: Trace, utilisation: float = 0.8):
    return pool_of(
        [SHAPE],
        hosts=4,
        slots=6,
        assignments_per_s=host_speed(trace, 4, utilisation),
        loading_bytes_per_s=100e6,
    )


def test_drifting_loads_keep_their_deviation_and_follow_the_drift() -> None:
    still, wild = loads(40, drift=0.0), loads(40, drift=1.0)
    for trace, alike in ((still, True), (wild, False)):
        log_WE = np.log(np.maximum(trace.counts[LayerKey("m", 0)], 1))
        correlation = np.corrcoef(log_WE[0], log_WE[20])[0, 1]
        assert (correlation > 0.99) == alike
        assert 0.6 < log_WE.std(axis=1).mean() < 1.4
    total = still.counts[LayerKey("m", 0)].sum(axis=1)
    assert np.allclose(total, 1000.0 * WINDOW_S, rtol=0.05)


def test_a_day_goes_round_and_its_domains_take_turns() -> None:
    trace = daily_trace(
        [SHAPE],
        sigma=1.0,
        domains=3,
        windows=24,
        window_s=3600.0,
        assignments_per_s=1000.0,
        rng=np.random.default_rng(1),
    )
    part_WE = trace.counts[LayerKey("m", 0)] / trace.counts[LayerKey("m", 0)].sum(axis=1)[:, None]
    step = np.abs(np.diff(part_WE, axis=0)).sum(axis=1)
    across = np.abs(part_WE[0] - part_WE[8]).sum()
    assert step.max() < 0.3
    assert across > 0.4
    assert np.abs(part_WE[0] - part_WE[-1]).sum() < 0.3


def test_ours_is_better_balanced_than_the_others_and_moves_less() -> None:
    trace = loads()
    made = pool(trace)
    policy = control_policy(made, every_s=WINDOW_S, budget=0.05, redundancy=0)
    static, eplb, ours = compare(trace, made, every=3, slo_s=0.1, policy=policy)
    assert ours.balancedness_mean > max(eplb.balancedness_mean, static.balancedness_mean)
    assert ours.balancedness_worst >= static.balancedness_worst
    assert 0 < ours.moved_slots < eplb.moved_slots / 3
    assert ours.moved_bytes == ours.moved_slots * SHAPE.expert_bytes
    assert static.moved_slots == 0
    assert static.slo_violations > ours.slo_violations
    assert {one.host_hours for one in (static, eplb, ours)} == {4 * 9 * WINDOW_S / 3600}
    assert len(ours.balancedness_W) == len(ours.moved_W) == 12


def test_every_way_serves_every_choice() -> None:
    trace = loads(8)
    made = pool(trace)
    for way in (Static(made), Eplb(made, every=2)):
        for window in range(8):
            counts = {key: counts_WE[window] for key, counts_WE in trace.counts.items()}
            served = way.serve(counts, WINDOW_S)
            for key, count_E in counts.items():
                assert served.load_H[key].sum() == pytest.approx(count_E.sum())


def test_deepseeks_placement_serves_when_the_last_host_has_loaded_it() -> None:
    trace = loads(6)
    slow = pool_of([SHAPE], hosts=4, slots=6, assignments_per_s=1e6, loading_bytes_per_s=1e6 / 25)
    way, before = Eplb(slow, every=1), Static(slow)
    counts = {key: counts_WE[0] for key, counts_WE in trace.counts.items()}
    first = way.serve(counts, WINDOW_S)
    assert first.moved_slots > 0
    # A host that loads n experts is done after 25 n seconds: here, in the middle of a later window.
    second, old = way.serve(counts, WINDOW_S), before.serve(counts, WINDOW_S)
    assert second.load_H[LayerKey("m", 0)] == pytest.approx(old.load_H[LayerKey("m", 0)])
    assert second.moved_slots == 0
    later = [way.serve(counts, WINDOW_S) for _ in range(6)]
    assert np.ptp(later[-1].load_H[LayerKey("m", 0)]) < np.ptp(old.load_H[LayerKey("m", 0)])


def test_a_day_as_series() -> None:
    hours, found = shifting_day(layers=1, experts=16, hosts=4, slots=6, window_s=1800.0)
    assert hours[0] == 0
    assert hours[-1] < 24
    assert [one.strategy for one in found] == ["static", "EPLB every 2", "ours"]
    assert all(len(one.balancedness_W) == len(hours) for one in found)
    assert found[2].balancedness_mean > found[0].balancedness_mean + 0.1


def tide(**more: object) -> list[StrategyResult]:
    """A day with four times as much traffic at its height as at night."""
    values = {"layers": 1, "experts": 16, "hosts": 4, "slots": 12, "window_s": 1800.0}
    values |= {"utilisation": 0.5, "swing": 0.6}
    return shifting_day(**(values | more))[1]  # pyright: ignore[reportArgumentType]


def test_the_autoscaler_takes_fewer_host_hours_and_misses_nothing() -> None:
    elastic = Elastic(min_hosts=1, max_hosts=4, cost_per_hour=3.0)
    static, _, ours, scaled = tide(elastic=elastic)
    assert scaled.strategy == "ours, autoscaled"
    assert static.host_hours == ours.host_hours == 4 * 23
    assert scaled.host_hours < 0.9 * ours.host_hours
    assert scaled.slo_violations == 0
    assert scaled.cost == 3 * scaled.host_hours
    assert scaled.scale_events >= 4
    # Down with the traffic, which is least at noon, and up again.
    hosts_W = scaled.hosts_W
    assert hosts_W[0] == hosts_W[-1] == 4
    # 16 experts do not fit on one host.
    assert 2 <= min(hosts_W[22:30]) < 3
    assert static.scale_events == ours.scale_events == 0


def test_hosts_that_start_late_are_paid_for_and_missed() -> None:
    quick = tide(elastic=Elastic(min_hosts=1, max_hosts=4, start_s=0.0))[-1]
    late = tide(elastic=Elastic(min_hosts=1, max_hosts=4, start_s=6 * 3600.0))[-1]
    assert quick.slo_violations == 0
    assert late.slo_violations > 0


def test_queues_keep_what_was_not_computed() -> None:
    queues = Queues()
    speed_H = np.array([10.0, 20.0])
    delay_s, computed_H = queues.advance(["a", "b"], np.array([30.0, 10.0]), speed_H, 1.0)
    assert (delay_s, computed_H.tolist()) == (2.0, [10.0, 10.0])
    # A host that leaves takes its queue along; a new one begins with none.
    delay_s, computed_H = queues.advance(["c", "a"], np.array([0.0, 5.0]), speed_H, 1.0)
    assert (delay_s, computed_H.tolist()) == (0.25, [0.0, 20.0])


# ---- the command --------------------------------------------------------------------------------


def test_simulate_prints_placements_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["simulate", "--layers", "1", "--experts", "16", "--hosts", "4", "--windows", "6"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["strategy"] for one in found] == ["static", "EPLB every 4", "ours"]


def test_simulate_lets_hosts_come_and_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "hosts: [{count: 4, min_count: 2, max_count: 5, cost_per_hour: 2.0}]\n"
        "autoscale: {scale_down_below: 0.3, scale_up_above: 0.6}\n"
    )
    command = ["simulate", "--layers", "1", "--experts", "16", "--hosts", "4", "--windows", "8"]
    assert main([*command, "--spec", str(spec), "--max-hosts", "6", "--json"]) == 0
    scaled = json.loads(capsys.readouterr().out)[-1]
    assert scaled["strategy"] == "ours, autoscaled"
    assert 4 < max(scaled["hosts_W"]) <= 6  # busier than 0.6 they are
    assert scaled["cost"] == 2 * scaled["host_hours"]


def test_simulate_reads_a_recorded_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = loads(6)
    recorded = Trace(
        window_s=made.window_s,
        counts=made.counts,
        hosts=("a", "b", "c"),
        assignments_WH=np.full((6, 3), 1000, dtype=np.int64),
        busy_s_WH=np.full((6, 3), 2.0),
        queued_s_WH=np.zeros((6, 3)),
    )
    assert host_speed(recorded, 3, 0.5) == 500.0
    path = tmp_path / "loads.safetensors"
    write_trace(path, recorded)
    assert main(["simulate", "--trace", str(path), "--every", "2"]) == 0
    assert "ours" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--slots", "1"], "too few"),
        (["--windows", "4", "--every", "4"], "4 windows"),
        (["--faults", "-1"], "--faults"),
        (["--min-hosts", "5", "--max-hosts", "4"], "5, 4"),
        (["--max-hosts", "2"], "min_hosts"),
    ],
)
def test_wrong_options_are_named(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *options]) == 2
    assert words in capsys.readouterr().err


def test_simulate_says_that_invariants_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--faults", "5", "--seeds", "2", "--seconds", "3"]) == 0
    assert "all invariants hold" in capsys.readouterr().out


def test_a_broken_seed_is_printed_with_the_command_that_replays_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def take(self: KeyValueStore, term: int) -> bool:
        # Every controller has the first term.
        self.latest_term = -1
        return term == 0

    monkeypatch.setattr(KeyValueStore, "put_term", take)
    seed = next(s for s in range(40) if run_seed(s, faults_s=5.0).violation is not None)
    command = ["simulate", "--faults", str(seed), "--seconds", "5"]
    assert main(command) == 1
    printed = capsys.readouterr().out
    assert f"seed {seed}: broken: " in printed
    assert f"moesaic simulate --faults {seed} --seconds 5" in printed
    assert main([*command, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["broken"] == 1
    assert found["runs"][0]["violation"]["message"]
    assert found["runs"][0]["last_events"]
