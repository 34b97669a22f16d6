"""Several owners: their updates are those of one optimizer over all; state moves between them."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import Tensor

from moesaic.kernels.training.owned_tensors import OwnedTensors
from moesaic.kernels.training.update_rules import UpdateRule
from moesaic.proto.errors import BadInput

Key = tuple[str, int, int]
KEYS: list[Key] = [("m", layer, expert) for layer in range(2) for expert in range(5)]
SHAPES = {"up": (33, 17), "down": (17, 16), "up_bias": (33,)}
MATRICES = {"up": (33, 17), "down": (17, 16)}
# All that torch.optim has; `test_no_optimizer_is_forgotten` compares.
RULES: dict[str, dict[str, object]] = {
    "ASGD": {},
    "Adadelta": {},
    "Adafactor": {"weight_decay": 0.1},
    "Adagrad": {},
    "Adam": {"amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"weight_decay": 0.1},
    "Adamax": {},
    "Muon": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "SGD": {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
}
SPREADS = [1, 2, 3, 4]  # how many owners


def shapes_for(name: str) -> dict[str, tuple[int, ...]]:
    return MATRICES if name == "Muon" else SHAPES


def groups_for(name: str) -> dict[str, int]:
    return dict.fromkeys(shapes_for(name), 0)


def drawn(name: str, seed: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        tensor: torch.randn(shape, generator=generator, dtype=dtype).to(device)
        for tensor, shape in shapes_for(name).items()
    }


def gradients(
    name: str, step: int, at: int, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Tensor] | None:
    """In some steps an expert has none, because it had no tokens."""
    return None if (step + at) % 4 == 3 else drawn(name, 1000 * (step + 1) + at, dtype, device)


def lr(step: int) -> float:
    return 0.01 / (step + 1)


def coefficient(step: int) -> float:
    return 1.0 if step % 2 else 0.3


def spread(
    rule: UpdateRule, owners: int, dtype: torch.dtype, device: str = "cpu"
) -> list[OwnedTensors[Key]]:
    made = [OwnedTensors[Key](rule) for _ in range(owners)]
    for at, key in enumerate(KEYS):
        made[(at * 7) % owners].own(key, drawn(rule.name, at, dtype, device), groups_for(rule.name))
    return made


def train(
    owners: list[OwnedTensors[Key]], steps: range, dtype: torch.dtype, device: str = "cpu"
) -> None:
    for step in steps:
        for owner in owners:
            for key in owner:
                found = gradients(owner.rule.name, step, KEYS.index(key), dtype, device)
                owner.prepare(step, key, found)
        for owner in owners:
            owner.commit(step, {0: (coefficient(step), {"lr": lr(step)})})


def state_by_key(owners: list[OwnedTensors[Key]]) -> dict[tuple[object, str], Tensor]:
    return {
        (key, name): tensor
        for owner in owners
        for key in owner
        for name, tensor in owner.state(key).items()
    }


def assert_same_bits(
    some: dict[tuple[object, str], Tensor], others: dict[tuple[object, str], Tensor]
) -> None:
    assert some.keys() == others.keys()
    differing = [at for at, one in some.items() if not torch.equal(one, others[at])]
    assert not differing


def test_no_optimizer_is_forgotten() -> None:
    there = {
        name
        for name, one in vars(torch.optim).items()
        if isinstance(one, type) and issubclass(one, torch.optim.Optimizer)
    }
    assert there == RULES.keys() | {"Optimizer", "LBFGS", "SparseAdam"}


@pytest.mark.parametrize("owners", SPREADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", list(RULES))
def test_owners_make_the_bits_of_one_optimizer_over_all(
    name: str, dtype: torch.dtype, owners: int
) -> None:
    rule = UpdateRule(name, **RULES[name])
    plain = [drawn(name, at, dtype) for at in range(len(KEYS))]
    everything = [tensor for tensors in plain for tensor in tensors.values()]
    options: dict[str, object] = {}
    if name in ("Adagrad", "Adam", "AdamW", "SGD"):
        options = {"fused": True}
    elif name != "Muon":
        options = {"foreach": False}
    optimizer = getattr(torch.optim, name)(everything, **RULES[name], **options)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = lr(step)
        for at, tensors in enumerate(plain):
            found = gradients(name, step, at, dtype)
            for tensor_name, tensor in tensors.items():
                tensor.grad = (
                    torch.zeros_like(tensor)
                    if found is None
                    else found[tensor_name] * coefficient(step)
                )
        optimizer.step()
    made = spread(rule, owners, dtype)
    assert sum(map(len, made)) == len(KEYS)
    train(made, range(5), dtype)
    found = {key: owner.weights(key) for owner in made for key in owner}
    for at, key in enumerate(KEYS):
        for tensor_name, tensor in plain[at].items():
            assert torch.equal(found[key][tensor_name], tensor), (key, tensor_name)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_experts_one_by_one_have_the_bits_of_all_in_one_parameter(name: str) -> None:
    """So transformers keeps the experts of a layer, and an idle one's gradient is zero there."""
    rule, owner = (
        UpdateRule(name, **RULES[name]),
        OwnedTensors[int](UpdateRule(name, **RULES[name])),
    )
    generator = torch.Generator().manual_seed(0)
    together = torch.randn(5, 33, 17, generator=generator)
    for expert, tensor in enumerate(together):
        owner.own(expert, {"up": tensor.clone()}, {"up": 0})
    optimizer = rule.optimizer_of(together)
    for step in range(5):
        together.grad = torch.randn(5, 33, 17, generator=generator)
        if step:
            together.grad[step] = 0.0
        for expert, gradient in enumerate(together.grad):
            owner.prepare(step, expert, None if expert == step > 0 else {"up": gradient.clone()})
        optimizer.step()
        owner.commit(step, {0: (1.0, {})})
    for expert, tensor in enumerate(together):
        assert torch.equal(owner.weights(expert)["up"], tensor)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", list(RULES))
def test_saved_and_restored_with_other_owners_training_goes_on_to_the_bit(
    name: str, dtype: torch.dtype, device: str
) -> None:
    rule = UpdateRule(name, **RULES[name])
    undisturbed = spread(rule, 3, dtype, device)
    train(undisturbed, range(10), dtype, device)
    before = spread(rule, 2, dtype, device)
    train(before, range(5), dtype, device)
    files = {key: safetensors.torch.save(owner.state(key)) for owner in before for key in owner}
    after = [OwnedTensors[Key](rule) for _ in range(4)]
    for at, (key, file) in enumerate(files.items()):
        # Masters are given where they are to be; the rest of the state follows them.
        state = {
            entry: tensor.to(device) if entry.endswith(".master") else tensor
            for entry, tensor in safetensors.torch.load(file).items()
        }
        after[at % 4].restore(key, state, dict.fromkeys(shapes_for(name), dtype), groups_for(name))
    train(after, range(5, 10), dtype, device)
    assert_same_bits(state_by_key(after), state_by_key(undisturbed))


def test_state_before_the_first_step_is_restored_too() -> None:
    rule = UpdateRule("AdamW")
    owner, again = OwnedTensors(rule), OwnedTensors(rule)
    owner.own("e", drawn("AdamW", 1, torch.float32), groups_for("AdamW"))
    state = {name: tensor.clone() for name, tensor in owner.state("e").items()}
    assert state.keys() == {f"{name}.{kind}" for name in SHAPES for kind in ("master", "commits")}
    again.restore("e", state, dict.fromkeys(SHAPES, torch.float32), groups_for("AdamW"))
    for each in (owner, again):
        each.prepare("a", "e", drawn("AdamW", 2, torch.float32))
        each.commit("a", {0: (1.0, {})})
    assert_same_bits(state_by_key([owner]), state_by_key([again]))


def test_half_precision_is_restored_from_the_master() -> None:
    rule = UpdateRule("AdamW")
    owner, again = OwnedTensors(rule), OwnedTensors(rule)
    owner.own("e", {"up": torch.ones(3, 3, dtype=torch.bfloat16)}, {"up": 0})
    owner.prepare("a", "e", {"up": torch.ones(3, 3)})
    owner.commit("a", {0: (1.0, {"lr": 1e-5})})
    assert torch.equal(owner.weights("e")["up"], torch.ones(3, 3, dtype=torch.bfloat16))
    state = {name: tensor.clone() for name, tensor in owner.state("e").items()}
    again.restore("e", state, {"up": torch.bfloat16}, {"up": 0})
    assert again.weights("e")["up"].dtype == torch.bfloat16
    assert (again.state("e")["up.master"] < 1).all()


def test_state_stands_still_while_the_next_step_is_prepared() -> None:
    owner = OwnedTensors(UpdateRule("AdamW"))
    owner.own("e", drawn("AdamW", 1, torch.float32), groups_for("AdamW"))
    owner.prepare(0, "e", drawn("AdamW", 2, torch.float32))
    owner.commit(0, {0: (1.0, {})})
    state = owner.state("e")
    before = {name: tensor.clone() for name, tensor in state.items()}
    owner.prepare(1, "e", drawn("AdamW", 3, torch.float32))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    owner.commit(1, {0: (1.0, {})})
    assert int(before["up.commits"]) == 1
    assert int(owner.state("e")["up.commits"]) == 2
    assert not torch.equal(state["up.exp_avg"], before["up.exp_avg"])


def damaged(change: str) -> dict[str, Tensor]:
    owner = OwnedTensors(UpdateRule("AdamW"))
    owner.own("e", drawn("AdamW", 1, torch.float32), groups_for("AdamW"))
    owner.prepare(0, "e", drawn("AdamW", 2, torch.float32))
    owner.commit(0, {0: (1.0, {})})
    state = {name: tensor.clone() for name, tensor in owner.state("e").items()}
    what, _, entry = change.partition(" ")
    if what == "lose":
        return {name: one for name, one in state.items() if not name.endswith(entry)}
    if what == "add":
        return state | {entry: torch.zeros(3)}
    if what == "shorten":
        return state | {entry: state[entry][:-1]}
    return state | {entry: state[entry].double()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lose up.master", "state of e: up.master is missing"),
        ("lose down.commits", "state of e: down.commits is missing"),
        ("lose down.exp_avg_sq", r"state of e: down: \['exp_avg_sq'\] is missing after 1 commits"),
        ("lose up_bias.step", r"state of e: up_bias: \['step'\] is missing after 1 commits"),
        ("add up.momentum_buffer", r"state of e: up: AdamW keeps no \['momentum_buffer'\]"),
        ("add gate.exp_avg", "state of e: gate.exp_avg is of no tensor"),
        ("shorten up.exp_avg", r"up.exp_avg is torch.float32 \(32, 17\), and must be .*\(33, 17\)"),
        ("widen up.exp_avg", r"up.exp_avg is torch.float64 .* must be torch.float32"),
        ("widen up.master", r"up.master is torch.float64, and must be torch.float32"),
    ],
)
def test_state_that_is_not_whole_is_refused(change: str, message: str) -> None:
    owner = OwnedTensors(UpdateRule("AdamW"))
    with pytest.raises(BadInput, match=message):
        owner.restore(
            "e", damaged(change), dict.fromkeys(SHAPES, torch.float32), groups_for("AdamW")
        )
    assert "e" not in owner
