"""Hosts on a device take part in training: their experts' gradients, and whole steps.

The device's memory is played by the CPU's, and its kernels run in Triton's interpreter; on a card
the same tests run compiled, with a trunk on the card.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.actors.transport.shm import ShmSession
from moesaic.cluster.expert_keys import SHARED, ExpertKey, ExpertVersion
from moesaic.cluster.training.contributions import Contributions
from moesaic.cluster.training.orders import NewlyOwned, OpenRun, Own
from moesaic.kernels.slabs.layer_arithmetic import DeviceLayer
from moesaic.models.trunk.experts_layers import experts_layers
from moesaic.proto.errors import BadExpert, CallError
from moesaic.proto.expert_pb2 import Frame
from tests.helpers.models.normed import saved_normed
from tests.helpers.models.versions import newest_transformers
from tests.helpers.pool.serving import KEY, serving
from tests.helpers.training.disturbed import HASTY
from tests.helpers.training.runs import held, optimizing, training_pool
from tests.helpers.training.steps import experts_in
from tests.helpers.training.trunks import (
    FIRST,
    IDS,
    Trunk,
    assert_equal,
    assert_near,
    enable_checkpointing,
    loss_of,
    plain_model,
    saved,
    training,
)

F32 = torch.float32
# AdamW's first steps divide a gradient by its own size, so with less rounding shows in the sign.
EPS = 1e-3
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
# Of tests that take many seconds in the interpreter.
SLOW_DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), DEVICES[1]]
# Each form of experts: gated; bias, clamps, interleaved and transposed; not gated.
ARCHITECTURES = ("mixtral", "gpt_oss", "nemotron_h")

pytestmark = [
    pytest.mark.usefixtures("one_kernel_at_a_time"),
    pytest.mark.timeout(300),
    # The interpreter multiplies whole tiles with NumPy, unused rows included.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("mixtral"), "mixtral")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def on(device: str, **options: Any) -> dict[str, Any]:
    return {"on_device": True, "device": device, "dtype": F32} | options


def assert_on_a_device(trunk: Trunk) -> None:
    for host in trunk.pool.hosts:
        assert isinstance(host._store.layer(KEY, 1, {}), DeviceLayer)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_every_form_of_experts(architecture: str, tmp_path: Path, device: str) -> None:
    folder = saved(tmp_path, architecture)
    plain = plain_model(folder, F32)
    loss_of(plain).backward()
    with training(folder, replicas=2, **on(device)) as trunk:
        trunk.begin()
        loss_of(trunk.model).backward()
        found = trunk.gradients(here=False)
        assert_equal(trunk, found, plain, folder, 1e-5)


@pytest.mark.parametrize("device", SLOW_DEVICES, indirect=True)
@pytest.mark.parametrize("exact", [False, True])
def test_gradients_of_several_microbatches(folder: Path, device: str, exact: bool) -> None:
    plain = plain_model(folder, F32)
    with training(folder, exact=exact, **on(device)) as trunk:
        assert_on_a_device(trunk)
        trunk.begin(exact=exact)
        for ids in (IDS[:1], IDS[1:, 3:]):
            for model in (plain, trunk.model):
                loss_of(model, ids).backward()
        assert_equal(trunk, trunk.gradients(here=False), plain, folder, 1e-5)


def test_16_bit_experts_have_float32_gradients(folder: Path, device: str) -> None:
    plain = plain_model(folder, torch.bfloat16)
    with training(folder, **on(device, dtype=torch.bfloat16)) as trunk:
        trunk.begin()
        for model in (plain, trunk.model):
            loss_of(model).backward()
        found = trunk.gradients(here=False)
        assert {t.dtype for tensors in found.values() for t in tensors.values()} == {F32}
        assert_equal(trunk, found, plain, folder, 0.1)


def test_trunks_with_lent_device_memory_send_their_backward_calls(
    folder: Path, device: str
) -> None:
    plain = plain_model(folder, F32)
    loss_of(plain).backward()
    with training(folder, borrows=True, **on(device)) as trunk:
        trunk.begin()
        loss_of(trunk.model).backward()
        assert trunk.learning.router.stats().lent > 0
        assert_equal(trunk, trunk.gradients(here=False), plain, folder, 1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_of_a_trunk_on_a_card_that_run_again_ask_the_pool_once(
    folder: Path, reentrant: bool
) -> None:
    """PyTorch runs the backward pass of a card's tensors in a thread of its own."""
    plain = plain_model(folder, F32)
    loss_of(plain).backward()
    with training(folder, **on("cuda")) as trunk:
        enable_checkpointing(trunk.model, reentrant=reentrant)
        trunk.begin()
        loss_of(trunk.model).backward()
        assert trunk.learning.router.stats().calls == len(trunk.pool.layers)
        assert_equal(trunk, trunk.gradients(here=False), plain, folder, 1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("exact", [False, True])
def test_a_trunk_on_a_card_learns_over_hosts_on_the_cpu(folder: Path, exact: bool) -> None:
    plain = plain_model(folder, F32)
    loss_of(plain).backward()
    with serving(folder, dtype=F32, learns=True, exact=exact) as pool:
        pool.device = "cuda"  # that of what uses it
        trunk = Trunk(pool, folder, F32, borrows=False)
        trunk.open()
        trunk.begin(exact=exact)
        loss_of(trunk.model).backward()
        assert_equal(trunk, trunk.gradients(here=False), plain, folder, 1e-5)


def test_experts_without_tokens_have_no_gradient(folder: Path, device: str) -> None:
    few = torch.tensor([[7, 3, 7]])
    plain = plain_model(folder, F32)
    with training(folder, hosts=1, **on(device)) as trunk:
        trunk.begin()
        for model in (plain, trunk.model):
            loss_of(model, few).backward()
        found = trunk.gradients(here=False)
        assert 0 < len(found) < 16, "three tokens use few experts"
        assert_equal(trunk, found, plain, folder, 1e-5)


@pytest.mark.parametrize("device", SLOW_DEVICES, indirect=True)
def test_sums_follow_experts_that_move_in_an_attempt(folder: Path, device: str) -> None:
    """Between two microbatches every expert goes to the other host, and those of a host to other
    slots; one comes back afterwards."""
    plain = plain_model(folder, F32)
    with training(folder, hosts=2, **on(device)) as trunk:
        pool = trunk.pool
        trunk.begin()
        versions = {
            host.name: [
                ExpertVersion(layer.expert(expert), 1)
                for layer, experts in host.report().holdings.items()
                for expert in experts
            ]
            for host in pool.hosts
        }
        first, second = pool.hosts
        for ids in (IDS, IDS.flip(1), IDS[:1]):
            for model in (plain, trunk.model):
                loss_of(model, ids).backward()
            given, taken = versions[first.name], versions[second.name]
            first.release(given)
            first.load([(pool.ref, pool.shape)], taken)
            second.release(taken)
            second.load([(pool.ref, pool.shape)], list(reversed(given)))
            versions = {first.name: taken, second.name: given}
            pool.swap(first.name, second.name)
            trunk.learning.router.place(pool.placement)
        assert_equal(trunk, trunk.gradients(here=False), plain, folder, 1e-5)


@pytest.mark.parametrize("doubled", [False, True])
def test_repeated_parts_count_once(
    folder: Path, device: str, monkeypatch: pytest.MonkeyPatch, doubled: bool
) -> None:
    """``doubled``: a host that did not know its parts again would be found out."""
    lost, send = iter([True, False, True]), ShmSession.send_reply

    def send_some(session: ShmSession, frame: Frame, buffer: Tensor) -> None:
        if not next(lost, False):
            send(session, frame, buffer)

    plain = plain_model(folder, F32)
    with training(folder, **on(device)) as trunk:
        # The interpreter takes its time for a part.
        trunk.connect(replace(HASTY, attempt_s=0.5))
        trunk.begin()
        loss_of(plain, IDS[:1]).backward()
        loss = loss_of(trunk.model, IDS[:1])
        if doubled:
            monkeypatch.setattr(Contributions, "admit", lambda *_: True)
        monkeypatch.setattr(ShmSession, "send_reply", send_some)
        loss.backward()
        assert next(lost, None) is None
        found = trunk.gradients(here=False)
        if doubled:
            with pytest.raises(AssertionError):
                assert_equal(trunk, found, plain, folder, 1e-5)
        else:
            assert_equal(trunk, found, plain, folder, 1e-5)


def test_an_expert_whose_gradients_are_not_finite_is_named(folder: Path, device: str) -> None:
    with training(folder, hosts=1, **on(device)) as trunk:
        trunk.begin()
        (host,) = trunk.pool.hosts
        loss = loss_of(trunk.model)
        layer = host._store.layer(KEY, 1, {})
        assert isinstance(layer, DeviceLayer)
        place = int(layer.slots.table_LE[0, 3])
        layer.slots.up_SUH[place, 0, 0] = torch.nan
        with pytest.raises(BadExpert, match="expert 3 of layer 1"):
            loss.backward()


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_steps_are_those_of_the_plain_model(folder: Path, device: str, dtype: torch.dtype) -> None:
    """Two steps of AdamW with clipping; masters and state are on the device."""
    plain = plain_model(folder, dtype)
    masters = plain_model(folder, F32)
    optimizer = torch.optim.AdamW(masters.parameters(), lr=1e-2, weight_decay=0.1, eps=EPS)
    options = on(device, dtype=dtype)
    with (
        training_pool(folder, hosts=2, replicas=2, **options) as pool,
        optimizing(pool, folder, dtype=dtype, redundancy=1, eps=EPS) as (model, ours),
    ):
        for ids in (IDS, IDS[:1]):
            loss_of(plain, ids).backward()
            loss_of(model, ids).backward()
            for own, rounded in zip(masters.parameters(), plain.parameters(), strict=True):
                own.grad, rounded.grad = rounded.grad.float(), None
            wanted = torch.nn.utils.clip_grad_norm_(masters.parameters(), 0.5)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            assert float(norm) == pytest.approx(float(wanted), rel=1e-5 if dtype == F32 else 0.05)
            optimizer.step()
            ours.step()
            optimizer.zero_grad()
            ours.zero_grad()
            with torch.no_grad():
                for own, rounded in zip(masters.parameters(), plain.parameters(), strict=True):
                    rounded.copy_(own)
        for host in pool.hosts.hosts:
            run = host.training._run
            assert run is not None and len(run.owned)
            for key in run.owned:
                devices = {one.device.type for one in run.owned.masters(key).values()}
                assert devices == {device}
        experts = experts_in(masters)
        tolerance = 1e-5 if dtype == F32 else 0.1
        for key, tensors in held(pool, list(experts)).items():
            for name, tensor in tensors.items():
                assert_near(tensor.float(), experts[key][name], tolerance, f"{key} {name}")
        names = {id(p) for layer in experts_layers(masters) for p in layer.module.parameters()}
        own = dict(model.named_parameters())
        for name, wanted in masters.named_parameters():
            if id(wanted) not in names:
                assert_near(own[name].detach().float(), wanted.detach(), tolerance, name)
    assert pool.ended
    assert all(host.report().owned == 0 for host in pool.hosts.hosts)


@pytest.mark.parametrize("device", SLOW_DEVICES, indirect=True)
def test_owners_move_between_devices_and_checkpoints(
    folder: Path, tmp_path: Path, device: str
) -> None:
    """State goes out as files, and into hosts on the CPU and on a device, to the bit."""
    with (
        training_pool(folder, hosts=2, **on(device)) as pool,
        optimizing(pool, folder, dtype=F32) as (model, optimizer),
    ):
        loss_of(model).backward()
        optimizer.step()
        model.save_pretrained(tmp_path / "saved")
        kept = optimizer.state_dict()
        before = {
            (key, name): tensor.cpu()
            for host in pool.hosts.hosts
            for key in host.training._run.owned  # pyright: ignore[reportOptionalMemberAccess]
            for name, tensor in host.training._run.owned.state(key).items()  # pyright: ignore[reportOptionalMemberAccess]
        }
    others: list[dict[str, Any]] = [on(device), {"dtype": F32}]
    for options in others:
        with (
            training_pool(folder, hosts=1, **options) as pool,
            optimizing(pool, folder, dtype=F32, run=9) as (model, optimizer),
        ):
            optimizer.load_state_dict(kept)
            run = pool.hosts.hosts[0].training._run
            assert run is not None
            for (key, name), tensor in before.items():
                found = run.owned.state(key)[name]
                assert torch.equal(found.cpu(), tensor), f"{key} {name}"
            loss_of(model).backward()
            optimizer.step()


def test_float64_experts_are_refused_before_the_first_step(folder: Path, device: str) -> None:
    with training(folder, opened=False, **on(device, dtype=torch.float64)) as trunk:
        for host in trunk.pool.hosts:
            with pytest.raises(CallError, match="train no float64 experts"):
                host.train(OpenRun(run=FIRST.run, model="m", optimizer="SGD"))
            assert host.report().owned == 0


@newest_transformers
def test_post_expert_norms_are_refused_before_the_first_step(tmp_path: Path, device: str) -> None:
    folder = saved_normed(tmp_path)
    with training(folder, opened=False, **on(device)) as trunk:
        (host, *_) = trunk.pool.hosts
        host.train(OpenRun(run=FIRST.run, model="m", optimizer="SGD"))
        shared = Own(
            run=FIRST.run,
            versions=trunk.pool.placement.versions,
            step=0,
            keys={ExpertKey("m", 0, SHARED): NewlyOwned({"norm": 0}, None)},
        )
        with pytest.raises(CallError, match="hosts on GPUs train no post-expert norms"):
            host.train(shared)
        assert host.report().owned == 0
