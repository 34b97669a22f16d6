"""Gradients through the pool are those of the same model with its experts in the process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moesaic.actors.host.gradients import HostGradients
from moesaic.cluster.training.contributions import Contributions
from moesaic.cluster.training.orders import Begin
from moesaic.models.trunk.in_pool import experts_forward
from moesaic.models.trunk.routing_record import RoutingRecord
from moesaic.proto.errors import StepLost, Superseded, UnsupportedModel
from tests.helpers.models.architectures import tiny_model
from tests.helpers.training.disturbed import HASTY, Disturbed
from tests.helpers.training.trunks import (
    FIRST,
    IDS,
    assert_equal,
    enable_checkpointing,
    expected,
    loss_of,
    plain_model,
    saved,
    tolerance_of,
    training,
)

# Of each kind of form: gated, shared experts, bias and clamps and interleaved, not gated.
ARCHITECTURES = ("mixtral", "qwen2_moe", "gpt_oss", "nemotron_h", "deepseek_v3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("mixtral"), "mixtral")


@pytest.mark.parametrize("borrows", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_every_form_of_experts(
    architecture: str, tmp_path: Path, borrows: bool
) -> None:
    folder = saved(tmp_path, architecture)
    plain = plain_model(folder, torch.float64)
    loss_of(plain).backward()
    with training(folder, hosts=3, replicas=2, borrows=borrows) as trunk:
        trunk.begin()
        loss = loss_of(trunk.model)
        loss.backward()
        assert_equal(
            trunk, trunk.gradients(here=borrows), plain, folder, tolerance_of(architecture)
        )


@pytest.mark.parametrize("borrows", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_of_several_microbatches(
    folder: Path, dtype: torch.dtype, exact: bool, borrows: bool
) -> None:
    """With ``exact`` hosts compute backward calls, whatever they have lent."""
    plain = plain_model(folder, dtype)
    with training(folder, dtype=dtype, exact=exact, borrows=borrows) as trunk:
        trunk.begin(exact=exact)
        for ids in (IDS, IDS[:1], IDS[1:, 3:]):
            loss_of(plain, ids).backward()
            loss_of(trunk.model, ids).backward()
        found = trunk.gradients(here=borrows and not exact)
        assert_equal(trunk, found, plain, folder, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("borrows", [False, True])
def test_autocast(folder: Path, borrows: bool) -> None:
    """Experts compute in their own type; around them bfloat16 rounds."""
    plain = plain_model(folder, torch.float32)
    with training(folder, dtype=torch.float32, borrows=borrows) as trunk:
        trunk.begin()
        for model in (plain, trunk.model):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model)
            loss.backward()
        assert_equal(trunk, trunk.gradients(here=borrows), plain, folder, 0.05)


@pytest.mark.parametrize("borrows", [False, True])
def test_16_bit_experts(folder: Path, borrows: bool) -> None:
    plain = plain_model(folder, torch.bfloat16)
    with training(folder, dtype=torch.bfloat16, borrows=borrows) as trunk:
        trunk.begin()
        for model in (plain, trunk.model):
            loss_of(model).backward()
        found = trunk.gradients(here=borrows)
        assert {t.dtype for tensors in found.values() for t in tensors.values()} == {torch.float32}
        assert_equal(trunk, found, plain, folder, 0.1)


@pytest.mark.parametrize("borrows", [False, True])
def test_a_microbatch_without_rows_and_experts_without_tokens(folder: Path, borrows: bool) -> None:
    one = torch.tensor([[7, 7]])
    plain = plain_model(folder, torch.float64)
    with training(folder, hosts=3, borrows=borrows) as trunk:
        trunk.begin()
        for model in (plain, trunk.model):
            loss_of(model, one).backward()
        layer = trunk.learning.layer(1)
        x = torch.zeros(0, 32, dtype=torch.float64, requires_grad=True)
        ids, weights = torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2, dtype=torch.float64)
        found: Any = experts_forward(SimpleNamespace(pool=layer), x, ids, weights)  # pyright: ignore[reportArgumentType]
        found.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
        found = trunk.gradients(here=borrows)
        assert 0 < len(found) < 16, "one token uses few experts"
        assert_equal(trunk, found, plain, folder, 1e-12)


@pytest.mark.parametrize("borrows", [False, True])
def test_experts_learn_where_nothing_of_the_trunk_does(folder: Path, borrows: bool) -> None:
    plain = plain_model(folder, torch.float64)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_("experts" in name)
    loss_of(plain).backward()
    with training(folder, borrows=borrows) as trunk:
        trunk.model.requires_grad_(False)
        trunk.begin()
        loss_of(trunk.model).backward()
        assert_equal(trunk, trunk.gradients(here=borrows), plain, folder, 1e-12)


@pytest.mark.parametrize("borrows", [False, True])
def test_serving_a_trunk_that_learns_adds_nothing_up(folder: Path, borrows: bool) -> None:
    with training(folder, borrows=borrows) as trunk:
        trunk.begin()
        with torch.no_grad():
            loss_of(trunk.model)
        assert trunk.gradients(here=borrows) == {}


@pytest.mark.parametrize("borrows", [False, True])
def test_a_second_backward_pass_through_one_graph_is_an_error(folder: Path, borrows: bool) -> None:
    with training(folder, borrows=borrows) as trunk:
        trunk.begin()
        loss = loss_of(trunk.model)
        loss.backward(retain_graph=True)
        with pytest.raises(UnsupportedModel, match="second backward"):
            loss.backward()


def test_what_belongs_to_another_attempt_is_not_added_up(folder: Path) -> None:
    second = FIRST._replace(number=1)
    with training(folder) as trunk:
        with pytest.raises(StepLost, match=r"make a moesaic\.PoolOptimizer"):
            loss_of(trunk.model)
        trunk.begin()
        loss, later = loss_of(trunk.model), loss_of(trunk.model)
        for host in trunk.pool.hosts:
            host.train(Begin(attempt=second))
        with pytest.raises(StepLost, match="attempt 1 at step 0 of run 1 is under way"):
            loss.backward()
        trunk.learning.begin(second)
        with pytest.raises(StepLost, match="which is over"):
            later.backward()
        assert trunk.gradients(second) == {}
        with pytest.raises(Superseded):
            trunk.pool.hosts[0].train(Begin(attempt=FIRST))


def test_a_backward_call_after_the_gradients_are_gathered_is_refused(folder: Path) -> None:
    with training(folder) as trunk:
        trunk.begin()
        loss, late = loss_of(trunk.model), loss_of(trunk.model)
        loss.backward()
        before = trunk.on_hosts()
        with pytest.raises(StepLost, match="takes no more gradients"):
            late.backward()
        after = trunk.on_hosts()
        assert before.keys() == after.keys() != set()
        assert all(
            torch.equal(tensor, after[key][name])
            for key, tensors in before.items()
            for name, tensor in tensors.items()
        )


def test_what_an_error_kept_from_being_added_up_is_not_added_to_the_next_attempt(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = FIRST._replace(number=1)
    with training(folder) as trunk:
        trunk.begin()
        with monkeypatch.context() as patch:
            patch.setattr(HostGradients, "add_up", lambda _: None)
            loss_of(trunk.model).backward()
        trunk.begin(second)
        for host in trunk.pool.hosts:
            host._loop.call(host._loop.gradients.add_up)
        assert trunk.gradients(second) == {}


def test_a_host_that_is_gone_ends_the_attempt(folder: Path) -> None:
    with training(folder, replicas=2) as trunk:
        trunk.begin()
        loss, other = loss_of(trunk.model), loss_of(trunk.model)
        trunk.pool.hosts[0].close()
        with pytest.raises(StepLost, match="host-0"):
            loss.backward()
        with pytest.raises(StepLost, match="which is over"):
            other.backward()


@pytest.mark.parametrize("doubled", [False, True])
def test_answers_that_are_lost_damaged_or_late_change_no_gradient(
    folder: Path, monkeypatch: pytest.MonkeyPatch, doubled: bool
) -> None:
    """``doubled``: a host that did not know its parts again would be found out."""
    disturbed = Disturbed(3)
    microbatches = [IDS[:, : 3 + number] for number in range(5)]
    plain = plain_model(folder, torch.float64)
    with training(folder, hosts=2) as trunk:
        trunk.connect(HASTY)
        trunk.begin()
        for ids in microbatches:
            loss_of(plain, ids).backward()
            loss = loss_of(trunk.model, ids)
            with disturbed.backward(monkeypatch) as patch:
                if doubled:
                    patch.setattr(Contributions, "admit", lambda *_: True)
                loss.backward()
        assert min(disturbed.counts[kind] for kind in ("lost", "damaged", "late")) > 0
        if doubled:
            with pytest.raises(AssertionError):
                assert_equal(trunk, trunk.gradients(), plain, folder, 1e-12)
        else:
            assert_equal(trunk, trunk.gradients(), plain, folder, 1e-12)


@pytest.mark.parametrize(
    ("architecture", "reentrant", "borrows"),
    [
        *((architecture, False, False) for architecture in ARCHITECTURES),
        ("mixtral", True, False),
        ("mixtral", True, True),
        ("gpt_oss", False, True),
    ],
)
def test_checkpointed_layers_ask_the_pool_once(
    architecture: str, reentrant: bool, tmp_path: Path, borrows: bool
) -> None:
    folder = saved(tmp_path, architecture)
    plain = plain_model(folder, torch.float64)
    loss_of(plain).backward()
    with training(folder, borrows=borrows) as trunk:
        enable_checkpointing(trunk.model, reentrant=reentrant)
        trunk.begin()
        loss_of(trunk.model).backward()
        assert trunk.learning.router.stats().calls == len(trunk.pool.layers)
        assert_equal(
            trunk, trunk.gradients(here=borrows), plain, folder, tolerance_of(architecture)
        )


@pytest.mark.parametrize(("recorded", "borrows"), [(True, False), (True, True), (False, False)])
def test_a_gate_that_computes_something_else_again_chooses_the_same_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool, borrows: bool
) -> None:
    """Where three experts are nearly alike, the last bits decide which two are chosen."""
    if not recorded:
        monkeypatch.setattr(RoutingRecord, "run", lambda _, function, *args: function(*args))
    model = tiny_model("mixtral")
    for gate in gates_of(model):
        gate.weight.data[1::3] = gate.weight.data[0::3] * 1.000001
        gate.weight.data[2::3] = gate.weight.data[0:6:3] * 1.000002
    model.save_pretrained(tmp_path)
    plain = plain_model(tmp_path, torch.float64)
    loss_of(plain).backward()
    with training(tmp_path, borrows=borrows) as trunk:
        enable_checkpointing(trunk.model, reentrant=False)
        trunk.begin()
        loss = loss_of(trunk.model)
        for gate in gates_of(trunk.model):
            noise = torch.linspace(-1e-5, 1e-5, gate.weight.numel(), dtype=gate.weight.dtype)
            gate.weight.data = gate.weight.data + noise.view(gate.weight.shape)
        loss.backward()
        found = trunk.gradients(here=borrows)
    worst = max(
        float((found[key][name] - wanted).abs().max() / wanted.abs().max())
        for key, tensors in expected(plain, tmp_path)[1].items()
        for name, wanted in tensors.items()
        if key in found
    )
    assert (worst < 1e-3) == recorded, worst


def gates_of(model: Any) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
