"""An owner's two phases: prepare and commit, what they refuse, and what stays unchanged."""

from __future__ import annotations

import math
import weakref
from contextlib import nullcontext

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels.training.owned_tensors import GroupUpdate, OwnedTensors
from moesaic.kernels.training.update_rules import OwnerBytes, UpdateRule
from moesaic.proto.errors import BadExpert, BadInput, InternalError, NotHere

SHAPES = {"up": (6, 5), "down": (5, 3), "up_bias": (6,)}
LR = {"lr": 0.05}


GROUPS = dict.fromkeys(SHAPES, 0)


def times(coefficient: float) -> dict[int, GroupUpdate]:
    return {0: (coefficient, LR)}


def draw(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(s, generator=generator).to(dtype) for name, s in SHAPES.items()}


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(
        one.dtype == others[name].dtype and torch.equal(one, others[name])
        for name, one in some.items()
    )


def owner_of(*keys: int) -> OwnedTensors[int]:
    owner = OwnedTensors[int](UpdateRule("AdamW", weight_decay=0.1))
    for key in keys:
        owner.own(key, draw(key), GROUPS)
    return owner


def everything(owner: OwnedTensors[int]) -> dict[str, Tensor]:
    """Return copies of all state, by key and name."""
    return {
        f"{key}.{name}": tensor.clone()
        for key in owner
        for name, tensor in owner.state(key).items()
    }


def test_squared_norms_are_added_up_in_float64() -> None:
    owner = OwnedTensors(UpdateRule("SGD"))
    owner.own("e", {"up": torch.zeros(3, 700)}, {"up": 0})
    gradient = torch.full((3, 700), 1e-30)
    gradient[1, 5] = 3e37
    gradient[2, 6] = -3e37
    (found,) = owner.prepare("a", "e", {"up": gradient}).values()
    assert found == pytest.approx(2 * 9e74, rel=1e-6)
    owner.abandon()
    tiny = owner.prepare("a", "e", {"up": torch.full((3, 700), 1e-30)})["up"]
    assert tiny == pytest.approx(2100e-60, rel=1e-6)


def test_what_was_prepared_and_not_committed_changes_nothing() -> None:
    owner = owner_of(1, 2)
    before = everything(owner)
    owner.prepare("a", 1, draw(11))
    owner.prepare("a", 2, draw(12))
    owner.abandon()
    assert equal(everything(owner), before)
    assert owner.nbytes.gradient == 0
    with pytest.raises(NotHere, match="a is not prepared here: nothing is"):
        owner.commit("a", times(1.0))
    other = owner_of(1, 2)
    for each in (owner, other):
        each.prepare("b", 1, draw(13))
        each.prepare("b", 2, draw(14))
        each.commit("b", times(1.0))
    assert equal(everything(owner), everything(other))


def test_preparing_twice_counts_once() -> None:
    owner, once = owner_of(1), owner_of(1)
    norms = owner.prepare("a", 1, draw(11))
    assert owner.prepare("a", 1, draw(12)) == norms
    once.prepare("a", 1, draw(11))
    for each in (owner, once):
        each.commit("a", times(0.5))
    assert equal(everything(owner), everything(once))


def test_a_commit_may_be_repeated_and_does_nothing_then() -> None:
    owner = owner_of(1)
    owner.prepare("a", 1, draw(11))
    owner.commit("a", times(0.5))
    before, weights = everything(owner), copied(owner.weights(1))
    owner.commit("a", {0: (0.5, {"lr": 0.05})})
    assert equal(everything(owner), before)
    assert equal(owner.weights(1), weights)
    assert owner.committed == ("a", times(0.5))
    with pytest.raises(InternalError, match=r"a was committed as .*0\.5.*, not .*0\.25"):
        owner.commit("a", times(0.25))
    with pytest.raises(NotHere, match="a is committed: it takes no more gradients"):
        owner.prepare("a", 1, draw(12))
    assert equal(everything(owner), before)


def test_an_attempt_that_is_not_the_prepared_one_is_refused() -> None:
    owner = owner_of(1, 2)
    with pytest.raises(NotHere, match="a is not prepared here: nothing is"):
        owner.commit("a", times(1.0))
    owner.prepare("a", 1, draw(11))
    with pytest.raises(NotHere, match="b: a is prepared; abandon it first"):
        owner.prepare("b", 2, draw(12))
    with pytest.raises(NotHere, match="b is not prepared here: a is"):
        owner.commit("b", times(1.0))
    assert owner.missing("a") == [2]
    assert owner.missing("b") == [1, 2]
    with pytest.raises(NotHere, match="a is prepared in part: 2 is missing"):
        owner.commit("a", times(1.0))
    with pytest.raises(NotHere, match="3 has another owner"):
        owner.prepare("a", 3, None)
    owner.prepare("a", 2, None)
    owner.commit("a", times(1.0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite_are_named_and_never_applied(value: float) -> None:
    owner = owner_of(1, 2)
    before = everything(owner)
    owner.prepare("a", 1, None)
    gradients = draw(12)
    gradients["down"][2, 1] = value
    norms = owner.prepare("a", 2, gradients)
    assert {name: math.isfinite(one) for name, one in norms.items()} == {
        "up": True,
        "down": False,
        "up_bias": True,
    }
    assert owner.not_finite() == [(2, "down")]
    with pytest.raises(BadExpert, match="a: the gradient of down of 2 is not finite"):
        owner.commit("a", times(1.0))
    assert equal(everything(owner), before)


def test_a_norm_that_is_too_large_for_float64_is_not_finite() -> None:
    owner = OwnedTensors(UpdateRule("SGD"))
    owner.own("e", {"up": torch.zeros(2, 1, dtype=torch.float64)}, {"up": 0})
    assert owner.prepare("a", "e", {"up": torch.full((2, 1), 1.3e154, dtype=torch.float64)}) == {
        "up": math.inf
    }


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        (
            {"gate": torch.zeros(6, 5)},
            r"gradients of 1 are of \['gate'\], not \['down', 'up', 'up_b",
        ),
        (draw(1) | {"gate": torch.zeros(1)}, "gradients of 1 are of .*'gate'"),
        (draw(1) | {"down": torch.zeros(3, 5)}, r"gradient of down of 1 is .*\(3, 5\).*\(5, 3\)"),
        (draw(1, torch.bfloat16), r"gradient of up of 1 is \(torch.bfloat16.*torch.float32"),
    ],
)
def test_gradients_that_do_not_fit_are_named(gradients: dict[str, Tensor], message: str) -> None:
    owner = owner_of(1)
    with pytest.raises(BadInput, match=message):
        owner.prepare("a", 1, gradients)
    assert owner.missing("a") == [1]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (times(math.nan), "group 0: coefficient nan must be finite"),
        (times(-0.5), "group 0: coefficient -0.5 must be finite, and not negative"),
        ({}, "no settings for group 0"),
        ({0: (1.0, {"lr": -1.0})}, "lr: -1.0"),
        ({0: (1.0, {"rate": 1.0})}, "rate: 1.0: there is no such hyperparameter"),
    ],
)
def test_a_decision_that_cannot_be_applied_changes_nothing(
    chosen: dict[int, GroupUpdate], message: str
) -> None:
    owner = owner_of(1)
    before = everything(owner)
    owner.prepare("a", 1, draw(11))
    with pytest.raises(BadInput, match=message):
        owner.commit("a", chosen)
    assert equal(everything(owner), before)
    assert owner.committed is None
    owner.commit("a", times(1.0))


def test_an_owner_whose_update_failed_in_the_middle_says_so_from_then_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner = owner_of(1, 2, 3)
    for key in owner:
        owner.prepare("a", key, draw(10 + key))
    whole, updated = torch.optim.AdamW.step, []

    def step(self: torch.optim.AdamW) -> None:
        shape = tuple(self.param_groups[0]["params"][0].shape)
        if shape in SHAPES.values():
            updated.append(shape)
        if updated == [*SHAPES.values(), SHAPES["up"], SHAPES["down"]]:
            raise torch.OutOfMemoryError("no memory is left")
        whole(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    message = "a was applied in part: down of 2: OutOfMemoryError: no memory is left"
    with pytest.raises(InternalError, match=message):
        owner.commit("a", times(1.0))
    assert owner.committed is None
    assert owner.nbytes.gradient == 0
    for call in (
        lambda: owner.commit("a", times(1.0)),
        lambda: owner.prepare("b", 1, None),
        lambda: owner.weights(1),
        lambda: owner.state(1),
        lambda: owner.disown(1),
        lambda: owner.own(4, draw(4), GROUPS),
    ):
        with pytest.raises(InternalError, match=message):
            call()


def test_who_owns_what_changes_between_steps() -> None:
    owner = owner_of(1, 2)
    with pytest.raises(InternalError, match="1 is owned already"):
        owner.own(1, draw(1), GROUPS)
    with pytest.raises(BadInput, match=r"ids of 3: torch.int64 cannot be trained"):
        ids = torch.zeros(2, dtype=torch.int64)
        owner.own(3, {"up": torch.zeros(2, 2), "ids": ids}, {"up": 0, "ids": 0})
    assert list(owner) == [1, 2]
    owner.prepare("a", 1, draw(11))
    owner.prepare("a", 2, draw(12))
    owner.disown(2)
    assert 2 not in owner
    assert owner.nbytes.gradient == sum(tensor.nbytes for tensor in draw(1).values())
    owner.commit("a", times(1.0))
    owner.own(3, draw(3), GROUPS)  # its optimizer begins; that of 1 goes on
    owner.prepare("b", 1, None)
    owner.prepare("b", 3, draw(13))
    owner.commit("b", times(1.0))
    assert [int(owner.state(key)["up.step"]) for key in owner] == [2, 1]
    owner.disown(1)
    owner.disown(3)
    assert (len(owner), owner.nbytes) == (0, OwnerBytes(0, 0, 0))
    owner.commit("c", times(1.0))  # of nothing
    with pytest.raises(NotHere, match="1 has another owner"):
        owner.state(1)


def test_a_vector_is_not_for_muon() -> None:
    owner = OwnedTensors(UpdateRule("Muon"))
    with pytest.raises(BadInput, match="up_bias of 1: optimizer Muon: 1 dimensions"):
        owner.own(1, draw(1), GROUPS)
    assert len(owner) == 0


def test_wide_tensors_are_their_own_masters() -> None:
    owner, mine = OwnedTensors(UpdateRule("SGD")), draw(1)
    owner.own(1, mine, GROUPS)
    owner.prepare("a", 1, draw(2))
    owner.commit("a", times(1.0))
    assert equal(owner.weights(1), mine)
    assert not equal(mine, draw(1))


@pytest.mark.parametrize("turned", ["weight", "gradient", "both"])
def test_strides_do_not_show(turned: str) -> None:
    """Fused optimizers ignore them."""
    plain, other = OwnedTensors[int](UpdateRule("AdamW")), OwnedTensors[int](UpdateRule("AdamW"))
    weight, gradient = draw(1)["up"], draw(2)["up"]
    plain.own(1, {"up": weight.clone()}, {"up": 0})
    plain.prepare("a", 1, {"up": gradient.clone()})
    if turned != "gradient":
        weight = weight.t().contiguous().t()
    if turned != "weight":
        gradient = gradient.t().contiguous().t()
    other.own(1, {"up": weight}, {"up": 0})
    other.prepare("a", 1, {"up": gradient})
    for owner in (plain, other):
        owner.commit("a", times(0.5))
    assert torch.equal(plain.weights(1)["up"], other.weights(1)["up"])
    assert all(tensor.is_contiguous() for tensor in other.state(1).values())


@pytest.mark.parametrize("name", ["AdamW", "NAdam"])  # fused, and not
def test_what_is_made_in_inference_mode_is_changed_outside_of_it_and_inside(name: str) -> None:
    usual, odd = (OwnedTensors[int](UpdateRule(name, weight_decay=0.1)) for _ in range(2))
    usual.own(1, draw(1), GROUPS)
    with torch.inference_mode():
        odd.own(1, draw(1), GROUPS)
        odd.prepare("a", 1, draw(11))
        odd.commit("a", times(0.5))
        odd.prepare("b", 1, draw(12))
        state, weights = odd.state(1), odd.weights(1)
    kept = [one for entry, one in state.items() if not entry.endswith(".commits")]
    assert not any(tensor.is_inference() for tensor in [*kept, *weights.values()])
    odd.commit("b", times(0.5))
    for attempt, seed in (("a", 11), ("b", 12)):
        usual.prepare(attempt, 1, draw(seed))
        usual.commit(attempt, times(0.5))
    assert equal(everything(usual), everything(odd))


@pytest.mark.parametrize("end", ["commit", "abandon", "disown"])
def test_the_memory_of_gradients_is_freed(end: str) -> None:
    owner = owner_of(1)
    memory = {name: numpy.ones(shape, numpy.float32) for name, shape in SHAPES.items()}
    owner.prepare("a", 1, {name: torch.from_numpy(one) for name, one in memory.items()})
    held = [weakref.ref(one) for one in memory.values()]
    del memory
    assert all(one() is not None for one in held)
    if end == "commit":
        owner.commit("a", times(1.0))
    elif end == "abandon":
        owner.abandon()
    else:
        owner.disown(1)
    assert [one() for one in held] == [None] * 3


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("given", [[], ["up"], ["down", "up_bias"]])
def test_a_tensor_without_a_gradient_keeps_its_weight_and_its_state(
    name: str, given: list[str]
) -> None:
    momentum: dict[str, object] = {"momentum": 0.9} if name == "SGD" else {}
    owner = OwnedTensors[int](UpdateRule(name, weight_decay=0.1, **momentum))
    owner.own(1, draw(1), GROUPS)
    owner.prepare("a", 1, draw(11))
    owner.commit("a", times(1.0))
    before = everything(owner)
    squares = owner.prepare("b", 1, {each: draw(12)[each] for each in given})
    assert squares.keys() == set(given)
    owner.commit("b", times(1.0))
    after = everything(owner)
    changed = {entry for entry in before if not torch.equal(after[entry], before[entry])}
    kinds = ("master", "commits", "momentum_buffer" if name == "SGD" else "exp_avg")
    assert changed >= {f"1.{each}.{kind}" for each in given for kind in kinds}
    assert {entry.split(".")[1] for entry in changed} == set(given)


def test_each_tensor_has_a_group() -> None:
    owner = OwnedTensors[int](UpdateRule("SGD"))
    some = {"up": 0, "down": 1}
    with pytest.raises(BadInput, match=r"1: tensors are .*'up_bias'\], with groups .*'up'\]"):
        owner.own(1, draw(1), some)
    owner.own(1, {name: draw(1)[name] for name in some}, some)
    state = {name: tensor.clone() for name, tensor in owner.state(1).items()}
    again = OwnedTensors[int](UpdateRule("SGD"))
    again.restore(1, state, dict.fromkeys(some, torch.float32), some)
    for each in (owner, again):
        each.prepare("a", 1, {name: draw(11)[name] for name in some})
        each.commit("a", {0: (1.0, {"lr": 0.5}), 1: (1.0, {"lr": 0.0})})
        torch.testing.assert_close(each.weights(1)["up"], draw(1)["up"] - 0.5 * draw(11)["up"])
        assert torch.equal(each.weights(1)["down"], draw(1)["down"])


def test_groups_have_their_own_hyperparameters() -> None:
    owner = OwnedTensors(UpdateRule("SGD"))
    owner.own(1, draw(1), dict.fromkeys(SHAPES, 1))
    owner.own(2, draw(2), GROUPS)
    for key in (1, 2):
        owner.prepare("a", key, draw(key + 10))
    with pytest.raises(BadInput, match="no settings for group 1"):
        owner.commit("a", {0: (1.0, {"lr": 0.5})})
    owner.commit("a", {0: (1.0, {"lr": 0.5}), 1: (0.5, {"lr": 0.25, "weight_decay": 2.0})})
    fast, slow = owner.weights(2), owner.weights(1)
    for name in SHAPES:
        torch.testing.assert_close(fast[name], draw(2)[name] - 0.5 * draw(12)[name])
        due = draw(1)[name] - 0.25 * (0.5 * draw(11)[name] + 2 * draw(1)[name])
        torch.testing.assert_close(slow[name], due)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_updates_too_small_for_the_weights_add_up_in_the_master(dtype: torch.dtype) -> None:
    owner = OwnedTensors(UpdateRule("SGD"))
    owner.own("e", {"up": torch.ones(3, 4, dtype=dtype)}, {"up": 0})
    step = 2.0**-14  # half precisions have 2^-8 or 2^-11 next to 1
    assert torch.equal(torch.ones(1, dtype=dtype) - step, torch.ones(1, dtype=dtype))
    for attempt in range(1024):
        owner.prepare(attempt, "e", {"up": torch.ones(3, 4)})
        owner.commit(attempt, {0: (1.0, {"lr": step})})
    weights = owner.weights("e")["up"]
    assert weights.dtype == dtype
    assert torch.equal(weights, torch.full((3, 4), 1 - 1024 * step, dtype=dtype))
    # Nothing but the last rounding: the master is what 1,024 such steps make.
    assert torch.equal(owner.state("e")["up.master"], torch.full((3, 4), 1 - 1024 * step))


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "SGD"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_memory_is_what_the_plan_says(name: str, dtype: torch.dtype) -> None:
    rule = UpdateRule(name)
    owner = OwnedTensors(rule)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = {"up": (96, 64), "down": (64, 48)}
    for key in range(3):
        owner.own(
            key,
            {n: torch.ones(shape, dtype=dtype) for n, shape in shapes.items()},
            dict.fromkeys(shapes, 0),
        )
    for attempt in range(2):
        for key in range(3):
            owner.prepare(attempt, key, {n: torch.ones(s, dtype=wide) for n, s in shapes.items()})
        if not attempt:
            owner.commit(attempt, times(1.0))
    planned = [rule.bytes_of(shape, dtype) for shape in shapes.values()] * 3
    assert owner.nbytes == OwnerBytes(*map(sum, zip(*planned, strict=True)))
    if name == "AdamW":
        parameters = 3 * sum(math.prod(shape) for shape in shapes.values())
        due = {torch.float32: 16, torch.bfloat16: 16, torch.float64: 32}[dtype]
        assert owner.nbytes.total / parameters == pytest.approx(due, rel=0.01)


ACTIONS = ["prepare 1", "prepare 2", "idle 1", "abandon", "commit", "commit again", "next attempt"]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(actions=st.lists(st.sampled_from(ACTIONS), max_size=40))
def test_whatever_happens_each_commit_is_applied_once_and_as_a_whole(actions: list[str]) -> None:
    """Compare with plain momentum, of the gradients that were prepared when a commit succeeded."""
    rule = UpdateRule("SGD", momentum=0.5, weight_decay=0.125)
    owner, attempt = OwnedTensors(rule), 0
    plain = {key: torch.full((2, 2), float(key)) for key in (1, 2)}
    optimizer = torch.optim.SGD(plain.values(), lr=0.05, momentum=0.5, weight_decay=0.125)
    for key, tensor in plain.items():
        owner.own(key, {"up": tensor.clone()}, {"up": 0})
    prepared: dict[int, Tensor] = {}
    prepared_for = committed = None
    for seed, action in enumerate(actions):
        what, _, number = action.partition(" ")
        if what == "next":
            attempt += 1
        elif what == "abandon":
            owner.abandon()
            prepared = {}
        elif what in ("prepare", "idle"):
            key = int(number)
            gradient = torch.full((2, 2), float(seed))
            refused = attempt == committed or (prepared and attempt != prepared_for)
            with pytest.raises(NotHere) if refused else nullcontext():
                owner.prepare(attempt, key, None if what == "idle" else {"up": gradient.clone()})
                prepared.setdefault(key, gradient if what == "prepare" else torch.zeros(2, 2))
                prepared_for = attempt
        else:
            tried = committed if number and committed is not None else attempt
            whole = len(prepared) == 2 and prepared_for == tried
            with nullcontext() if whole or tried == committed else pytest.raises(NotHere):
                owner.commit(tried, times(0.5))
            if whole and tried != committed:
                for key, tensor in plain.items():
                    tensor.grad = prepared[key] * 0.5
                optimizer.step()
                prepared, committed = {}, tried
        for key, tensor in plain.items():
            assert torch.equal(owner.weights(key)["up"], tensor)
        assert len(owner.missing(prepared_for)) == 2 - len(prepared)
