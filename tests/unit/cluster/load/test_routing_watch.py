"""When the routing of a layer counts as collapsed, and when it does not.

Shape suffixes: E = experts of a layer, T = tokens, K = experts of a token.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.load.routing_watch import (
    AGREEING,
    AGREEING_SERVED,
    LEAST_PER_EXPERT,
    RoutingWatch,
    routing_figures,
)

KEY = LayerKey("m", 3)
# (experts, experts of a token) of models that there are.
SIZES = [(4, 1), (4, 2), (8, 2), (16, 4), (64, 6), (128, 8)]

counts = st.lists(st.integers(0, 10**9), min_size=1, max_size=300)


class Gate:
    """Chooses experts for tokens by noise around fixed logits, as a trained gate does."""

    def __init__(self, experts: int, chosen: int, *, zipf: float = 0.0, seed: int = 0) -> None:
        self.experts, self.chosen = experts, chosen
        self.logits_E = -zipf * np.log(np.arange(1, experts + 1))
        self._random = np.random.default_rng(seed)

    def counts(self, tokens: int) -> np.ndarray:
        scores_TE = self.logits_E + self._random.gumbel(size=(tokens, self.experts))
        ids_TK = np.argpartition(-scores_TE, self.chosen - 1, axis=1)[:, : self.chosen]
        return np.bincount(ids_TK.reshape(-1), minlength=self.experts)

    def step(self, watch: RoutingWatch, tokens: int, **options: int) -> bool:
        """Let a watch see one step; return whether the layer has collapsed by then."""
        watch.add(KEY, self.counts(tokens), experts_per_token=self.chosen, **options)
        return collapsed(watch)


def collapsed(watch: RoutingWatch) -> bool:
    return any(one.collapsed for one in watch.layers("m"))


def steps_until(watch: RoutingWatch, gate: Gate, tokens: int, *, wanted: bool = True) -> int:
    return next(step for step in range(1, 100) if gate.step(watch, tokens) == wanted)


# ---- figures ------------------------------------------------------------------------------------


def test_figures_of_a_small_layer() -> None:
    found = routing_figures([6, 2, 0, 0])
    assert found is not None
    # Parts of 3/4 and 1/4.
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert found.entropy == pytest.approx(entropy)
    assert (found.max_over_mean, found.dead_experts, found.busiest_expert) == (3.0, 2, 0)


@given(counts)
def test_figures_are_within_their_bounds(counts_E: list[int]) -> None:
    found = routing_figures(counts_E)
    assert (found is None) == (not any(counts_E))
    if found is not None:
        experts = len(counts_E)
        assert 0 <= found.entropy <= 1
        assert 1 - 1e-9 <= found.max_over_mean <= experts
        assert found.dead_experts == counts_E.count(0) < experts
        assert counts_E[found.busiest_expert] == max(counts_E)


@given(counts.filter(any), st.randoms(use_true_random=False), st.integers(2, 1000))
def test_figures_depend_on_parts_alone(counts_E: list[int], random: object, factor: int) -> None:
    found = routing_figures(counts_E)
    mixed = [count * factor for count in counts_E]
    random.shuffle(mixed)  # pyright: ignore[reportAttributeAccessIssue]
    other = routing_figures(mixed)
    assert found is not None
    assert other is not None
    assert other.entropy == pytest.approx(found.entropy, abs=1e-9)
    assert other.max_over_mean == pytest.approx(found.max_over_mean)
    assert other.dead_experts == found.dead_experts


@pytest.mark.parametrize(("experts", "chosen"), SIZES)
def test_figures_at_both_ends(experts: int, chosen: int) -> None:
    even = routing_figures(np.full(experts, 7))
    same = routing_figures([100] * chosen + [0] * (experts - chosen))
    assert even is not None
    assert same is not None
    assert (even.entropy, even.max_over_mean, even.dead_experts) == pytest.approx((1, 1, 0))
    assert same.entropy == pytest.approx(math.log(chosen) / math.log(experts))
    assert same.max_over_mean == pytest.approx(experts / chosen)
    assert same.dead_experts == experts - chosen


@pytest.mark.parametrize("wrong", [[], [[1, 2]], [1, -1], [1, math.nan], [math.inf]])
def test_what_are_no_counts_is_refused(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match="counts"):
        routing_figures(wrong)
    with pytest.raises(ValueError, match="counts"):
        RoutingWatch().add(KEY, wrong)


# ---- collapse -----------------------------------------------------------------------------------


@pytest.mark.parametrize("zipf", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("experts", "chosen"), SIZES)
def test_popular_experts_are_no_collapse(experts: int, chosen: int, zipf: float) -> None:
    watch, gate = RoutingWatch(), Gate(experts, chosen, zipf=zipf)
    for _ in range(50):
        assert not gate.step(watch, tokens=LEAST_PER_EXPERT * experts // chosen)
    assert watch.warning("m") is None


@pytest.mark.parametrize("assignments_per_expert", [4, 20, 100])
@pytest.mark.parametrize(("experts", "chosen"), SIZES)
def test_a_gate_biased_to_one_expert_is_seen_within_20_steps(
    experts: int, chosen: int, assignments_per_expert: int
) -> None:
    """Whatever the other experts of each token are: they may be spread evenly."""
    watch, gate = RoutingWatch(), Gate(experts, chosen, zipf=0.5)
    tokens = math.ceil(assignments_per_expert * experts / chosen)
    for _ in range(10):
        assert not gate.step(watch, tokens)
    gate.logits_E[experts - 1] += 20.0
    steps = steps_until(watch, gate, tokens)
    assert steps <= 20
    worst = watch.worst("m")
    assert worst is not None
    assert (worst.layer, worst.busiest_expert) == (3, experts - 1)
    assert worst.max_over_mean == pytest.approx(experts / chosen, rel=0.05)
    text = watch.warning("m")
    assert text is not None
    assert "m has collapsed in 1 of 1 layers" in text
    assert f"(expert {experts - 1})" in text
    assert "balance_loss" in text
    gate.logits_E[experts - 1] -= 20.0
    assert steps_until(watch, gate, tokens, wanted=False) <= 20
    assert watch.warning("m") is None


@pytest.mark.parametrize(("experts", "chosen"), [(8, 2), (64, 8), (128, 8)])
def test_a_gate_that_uses_few_experts_evenly_is_seen(experts: int, chosen: int) -> None:
    """No expert stands out, but more than half of them are dead."""
    watch, gate = RoutingWatch(), Gate(experts, chosen)
    gate.logits_E[experts // 2 - 1 :] -= 40.0
    assert steps_until(watch, gate, tokens=2 * experts) <= 20
    worst = watch.worst("m")
    assert worst is not None
    assert worst.dead_experts == experts // 2 + 1


def test_few_experts_with_nearly_all_assignments_are_seen_though_none_is_dead() -> None:
    watch = RoutingWatch()
    counts_E = [1] * 60 + [4000] * 4
    for _ in range(AGREEING):
        watch.add(KEY, counts_E, experts_per_token=2)
    assert collapsed(watch)
    worst = watch.worst("m")
    assert worst is not None
    assert worst.dead_experts == 0


def test_a_layer_at_the_edge_does_not_come_and_go() -> None:
    """Its figures alternate between two sides of the bound that makes it collapsed."""
    watch = RoutingWatch()
    seen = []
    for step in range(100):
        # Of 100 assignments; gates choose one expert of 50.
        busiest = 96 if step % 10 >= 5 else 94
        rest = np.full(49, (100 - busiest) / 49)
        watch.add(KEY, np.array([busiest, *rest]) * 20, experts_per_token=1)
        seen.append(collapsed(watch))
    assert seen == sorted(seen), "it never recovers"
    assert seen[-1]


def test_a_collapse_of_few_samples_is_not_told() -> None:
    even, one = np.full(8, 20), [80, 80, *[0] * 6]
    watch = RoutingWatch()
    for step in range(60):
        watch.add(KEY, one if step % AGREEING else even, experts_per_token=2)
        assert not collapsed(watch)


def test_a_served_model_takes_longer() -> None:
    watch, gate = RoutingWatch(), Gate(8, 2)
    gate.logits_E[0] += 20.0
    tokens = LEAST_PER_EXPERT * 8 // 2
    for sample in range(1, AGREEING_SERVED + 1):
        seen = gate.step(watch, tokens, agreeing=AGREEING_SERVED)
        assert seen == (sample == AGREEING_SERVED)


def test_too_few_assignments_say_nothing() -> None:
    watch = RoutingWatch()
    watch.add(KEY, [LEAST_PER_EXPERT * 8 - 1, *[0] * 7], experts_per_token=1)
    watch.add(KEY, [0] * 8)
    assert watch.layers("m") == []
    assert watch.worst("m") is None
    watch.add(KEY, [1, *[0] * 7], experts_per_token=1)
    assert watch.layers("m") == [], "one sample"
    watch.add(KEY, [0, LEAST_PER_EXPERT * 8, *[0] * 6], experts_per_token=1)
    assert [one.dead_experts for one in watch.layers("m")] == [6]


@pytest.mark.parametrize("assignments", [200, 100_000])
def test_parts_of_a_call_that_are_reported_one_after_the_other_are_no_collapse(
    assignments: int,
) -> None:
    """Those of lent experts are reported when they are computed."""
    watch = RoutingWatch()
    for _ in range(50):
        watch.add(KEY, [assignments, *[0] * 7], experts_per_token=2)
        watch.add(KEY, [0, *[assignments] * 7], experts_per_token=2)
        assert not collapsed(watch)
        assert watch.layers("m")[0].dead_experts == 0


def test_gates_without_a_choice_do_not_collapse() -> None:
    watch = RoutingWatch()
    for _ in range(100):
        watch.add(KEY, [1000], experts_per_token=1)
        watch.add(LayerKey("m", 4), [500, 500], experts_per_token=2)
    assert not collapsed(watch)
    assert [one.entropy for one in watch.layers("m")] == [1.0, 1.0]


def test_without_the_number_of_choices_dead_experts_are_seen() -> None:
    watch = RoutingWatch()
    for _ in range(AGREEING):
        watch.add(KEY, [80, 80, *[0] * 6])
    assert collapsed(watch)


def test_layers_are_of_models_and_can_be_forgotten() -> None:
    watch = RoutingWatch()
    for layer, model in ((2, "m"), (1, "m"), (1, "n")):
        watch.add(LayerKey(model, layer), np.full(4, 100 + layer))
        watch.add(LayerKey(model, layer), np.full(4, 100 + layer))
    watch.add(LayerKey("m", 1), [40_000, 0, 0, 0])
    assert [one.layer for one in watch.layers("m")] == [1, 2]
    worst = watch.worst("m")
    assert worst is not None
    assert (worst.layer, worst.collapsed) == (1, True)
    watch.keep({LayerKey("n", 1)})
    assert watch.layers("m") == []
    assert len(watch.layers("n")) == 1


def test_a_layer_with_another_number_of_experts_starts_anew() -> None:
    watch = RoutingWatch()
    for _ in range(2):
        watch.add(KEY, [8000, *[0] * 7])
    assert collapsed(watch)
    for _ in range(2):
        watch.add(KEY, np.full(4, 100))
    assert [(one.experts, one.collapsed) for one in watch.layers("m")] == [(4, False)]


def test_a_loop_need_not_name_its_model() -> None:
    watch = RoutingWatch()
    for _ in range(2):
        watch.add(LayerKey("", 5), [800, *[0] * 7])
    text = watch.warning("")
    assert text is not None
    assert text.startswith("the routing has collapsed in 1 of 1 layers, the worst is layer 5: ")
