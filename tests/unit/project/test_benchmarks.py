"""The arithmetic of the benchmarks: what they print is only as good."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.all import BENCHMARKS, GROUPS, main
from benchmarks.elasticity.eplb_control import EplbControl, EplbPlan
from benchmarks.elasticity.training_replicas import DealtGates
from benchmarks.elasticity.training_replicas import summary as summary_of_replicas
from benchmarks.resilience.faults import Round, quiet_gaps, timeline
from benchmarks.resilience.training_kills import summary as summary_of_kills
from benchmarks.streams import Request, gaps, longest, wrong_texts
from benchmarks.traffic import MODEL, Traffic, balance_of, exponent_for
from benchmarks.training_load import TrainingLoad
from moesaic.cluster.control.commands import MakePlan
from moesaic.cluster.control.control import Control, ControlPolicy
from moesaic.cluster.control.pool_view import Observation
from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.load.meter import HostTimes, LoadReport
from moesaic.cluster.placement import HostEntry, ModelShape, initial_placement
from moesaic.cluster.planner.plan import PoolHost
from tests.helpers.paths import ROOT

TRAFFIC = Traffic(
    layers=2, experts=32, top_k=2, tokens=64, hidden=4, exponent=1.0, shift_s=10.0, shifts=2
)
HOSTS = ["a", "b", "c", "d"]
PLACED = initial_placement([ModelShape(model=MODEL, experts={0: 32, 1: 32})], HOSTS)


def even(exponent: float) -> Traffic:
    return Traffic(layers=2, experts=32, top_k=2, tokens=64, hidden=4, exponent=exponent)


# ---- folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "options"), BENCHMARKS.values(), ids=BENCHMARKS)
def test_what_runs_all_benchmarks_finds_each(module: str, options: list[str]) -> None:
    found = find_spec(module)
    assert found is not None
    assert found.origin is not None
    text = (ROOT / found.origin).read_text()
    assert f"python -m {module} " in text, "its docstring says how to run it"
    assert all(f'"{option}"' in text for option in ("--json", *options[:1]))


def test_an_unknown_benchmark_is_refused_before_any_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["layer", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("nothing: none of planner, ")


@pytest.mark.parametrize("group", GROUPS)
def test_a_folder_of_benchmarks_imports_no_other(group: str) -> None:
    files = list((ROOT / "benchmarks" / group).glob("*.py"))
    assert files
    for file in files:
        imported = set(re.findall(r"(?:from|import) benchmarks\.(\w+)\.", file.read_text()))
        assert imported <= {group}, file


# ---- traffic ------------------------------------------------------------------------------------


def test_tokens_pick_different_experts_and_popular_ones_more_often() -> None:
    ids = TRAFFIC.draw(TRAFFIC.log_popularity(0, 0), 4000, np.random.default_rng(0))
    assert ids.shape == (4000, 2)
    assert ids.dtype == np.int32
    assert (ids[:, 0] != ids[:, 1]).all()
    counts = np.bincount(ids.reshape(-1), minlength=32)
    by_popularity = counts[np.argsort(-TRAFFIC.log_popularity(0, 0))]
    assert by_popularity[0] > by_popularity[4] > by_popularity[20] > 0


def test_a_shift_exchanges_ranks_of_a_part_and_layers_differ() -> None:
    first, second = TRAFFIC.log_popularity(0, 0), TRAFFIC.log_popularity(0, 1)
    assert sorted(first) == sorted(second)
    assert 0 < (first != second).sum() <= 8
    assert (first != TRAFFIC.log_popularity(1, 0)).any()
    assert [TRAFFIC.shift_at(s) for s in (-5.0, 0.0, 9.9, 10.0, 99.0)] == [0, 0, 0, 1, 2]


def test_the_skew_is_found_at_which_fixed_shares_are_as_uneven_as_asked() -> None:
    found = exponent_for(0.6, even, PLACED)
    assert balance_of(even(found), PLACED) == pytest.approx(0.6, abs=0.02)
    assert balance_of(even(0.0), PLACED) > 0.9
    with pytest.raises(ValueError, match="no skew brings it below"):
        exponent_for(0.05, even, PLACED)


# ---- DeepSeek's rule as a controller ------------------------------------------------------------


def observed(control: Control, host: str) -> Observation:
    """A host that holds whatever it is to hold."""
    holdings: dict[LayerKey, dict[int, tuple[int, ...]]] = {}
    for key in control.wanted(host):
        holdings.setdefault(LayerKey(key.model, key.layer), {})[key.expert] = (1,)
    entry = HostEntry(host=host, incarnation=1, node="n", shm_address="", grpc_address=host)
    return Observation(entry=entry, holdings=holdings, loading=False)


def test_the_controller_with_deepseeks_rule_asks_it_for_balance_and_ours_for_the_rest() -> None:
    hosts = [PoolHost(name=name, slots=20) for name in HOSTS]
    control = EplbControl(hosts, term=1, policy=ControlPolicy(auto=False))
    control.add_model(ModelShape(model=MODEL, experts={0: 32, 1: 32}, expert_bytes=7), on_disk=True)
    for moment in (0.0, 1.0, 2.0):
        for command in control.tick({name: observed(control, name) for name in HOSTS}, moment):
            if isinstance(command, MakePlan):
                assert not isinstance(command, EplbPlan), "no balance is asked for yet"
                control.planned(command, command.run(), moment)
    standing = control.placement
    assert standing is not None
    counts = {key: TRAFFIC.load(key.layer, 0) for key in standing.layers}
    times = {"a": HostTimes(calls=1, assignments=100, busy_s=1.0)}
    control.hear(LoadReport(router="r", placement_id=None, counts=counts, hosts=times), 2.0)
    control.loads.advance(4.0)
    asked = control.plan_for(4.0)
    assert isinstance(asked, EplbPlan)
    found = asked.run()
    used = dict.fromkeys(HOSTS, 0)
    for key, layer in found.layers.items():
        for expert, replicas in enumerate(layer.replicas):
            assert sum(r.share for r in replicas) == pytest.approx(1.0)
            for replica in replicas:
                used[replica.host] += 1
            moved = [m.host for m in found.moves if m.key == key.expert(expert)]
            assert set(moved) == set(layer.hosts(expert)) - set(standing.layers[key].hosts(expert))
        assert found.after[key] > found.before[key]
    assert max(used.values()) <= 20
    assert {move.expert_bytes for move in found.moves} == {7}
    assert control.loader.slots == dict.fromkeys(HOSTS, 40)


# ---- faults -------------------------------------------------------------------------------------


def request(*times: float, ids: tuple[int, ...] = (), prompt: int = 0) -> Request:
    return Request(stream=0, prompt=prompt, times=list(times), ids=list(ids))


def harmed(began: float, whole: float) -> Round:
    return Round(kind="kill", host="a", began=began, ended=began, whole=whole)


def test_gaps_are_those_within_one_text() -> None:
    found = gaps([request(1.0, 1.5, 3.0), request(10.0)])
    assert found.tolist() == [[1.0, 1.5], [1.5, 3.0]]
    assert gaps([]).shape == (0, 2)


def test_a_gap_belongs_to_a_fault_when_it_touches_it() -> None:
    found = gaps([request(1.0, 1.5, 3.0, 3.2, 7.0)])
    assert longest(found, 2.0, 3.1) == pytest.approx(1.5)
    assert longest(found, 3.0, 3.1) == pytest.approx(0.2)
    assert longest(found, 8.0, 9.0) == 0.0
    assert quiet_gaps(found, [harmed(2.0, 3.1)]).tolist() == pytest.approx([0.5, 3.8])
    assert len(quiet_gaps(found, [])) == 4


def test_texts_are_compared_as_far_as_they_go() -> None:
    wanted = {0: [1, 2, 3], 1: [4]}
    assert wrong_texts([request(ids=(1, 2)), request(ids=(4,), prompt=1)], wanted) == 0
    assert wrong_texts([request(ids=(1, 9)), request(ids=(4, 5), prompt=1)], wanted) == 2


def test_a_timeline_shows_who_waits_longest() -> None:
    found = timeline(gaps([request(0.0, 9.8, 10.0, 10.2, 14.0), request(*range(20))]), 10.0, 11.0)
    assert (found["from_s"], found["ended_s"]) == (-8.0, 1.0)
    longest_s = dict(
        zip(np.arange(-8.0, 9.0, found["piece_s"]), found["longest_gap_s"], strict=True)
    )
    assert longest_s[-1.0] == 9.8
    assert longest_s[0.0] == 3.8
    assert longest_s[4.5] == 1.0


# ---- training -----------------------------------------------------------------------------------


def test_a_steps_number_decides_its_microbatches() -> None:
    load = TrainingLoad(microbatches=3, sequences=2, length=8, vocabulary=100)
    assert load.tokens == 48
    first, again, other = load.step(4), load.step(4), load.step(5)
    assert [one.shape for one in first] == [(2, 8)] * 3
    assert all(one.equal(same) for one, same in zip(first, again, strict=True))
    assert not first[0].equal(other[0])


def gated() -> tuple[DealtGates, list[Any]]:
    """Gates of a model of two layers that are dealt."""
    config = MixtralConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=32,
    )  # fmt: skip
    model: Any = MixtralForCausalLM(config)
    gates = [layer.mlp.gate for layer in model.model.layers]
    return DealtGates(model, TRAFFIC), gates


def test_dealt_gates_choose_the_same_again_and_learn() -> None:
    dealt, gates = gated()
    x_TH = torch.ones(64, 8)
    found = []
    for step in (3, 3, 4):
        dealt.begin(step)
        found.append([gate(x_TH) for gate in gates for _ in range(2)])
    ids = [[one[2].tolist() for one in step] for step in found]
    assert ids[0] == ids[1] != ids[2]
    assert ids[0][0] != ids[0][1], "a step's microbatches differ"
    assert ids[0][0] != ids[0][2], "layers differ"
    _, weights_TK, ids_TK = found[0][0]
    assert torch.allclose(weights_TK.sum(-1), torch.ones(64))
    assert (ids_TK[:, 0] != ids_TK[:, 1]).all()
    weights_TK[:, 0].sum().backward()
    assert gates[0].weight.grad.abs().sum() > 0


def test_gates_that_are_dealt_evenly_use_all_experts_alike() -> None:
    dealt, _ = gated()
    dealt.even = True
    ids = np.concatenate([dealt.ids(0, call, 40) for call in range(4)])
    assert (np.bincount(ids.reshape(-1)) == 10).all()
    assert (ids[:, 0] != ids[:, 1]).all()


def test_replicas_are_judged_by_ratios_within_rounds() -> None:
    rates = {"balanced": [2.0, 4.0, 1.0], "off": [1.0, 2.0, 0.5], "on": [1.9, 3.8, 0.9]}
    found = summary_of_replicas({"steps_per_s": rates, "overruns": 0})
    assert found["of_balanced"]["on"] == pytest.approx(0.95)
    assert found["of_off"]["on"] == pytest.approx(1.9)
    assert found["met"]
    assert found["valid"]
    assert not summary_of_replicas({"steps_per_s": {**rates, "on": rates["off"]}, "overruns": 1})[
        "met"
    ]


def test_a_kill_is_judged_beyond_a_step_and_against_ray_train() -> None:
    pool = [{"step_s": 1.0, "kill_to_step_s": took} for took in (2.0, 2.5, 9.0)]
    peer = [{"step_s": 1.0, "kill_to_step_s": took} for took in (20.0, 10.0, 60.0)]
    found = summary_of_kills(pool, peer)
    assert (found["beyond_a_step_s"], found["longest_beyond_a_step_s"]) == (1.5, 8.0)
    assert found["of_ray_train"] == pytest.approx(0.15)
    assert found["met"]
    assert summary_of_kills(pool, None)["met"]
    assert not summary_of_kills(pool, [one | {"kill_to_step_s": 8.0} for one in peer])["met"]
