"""Slots in device memory, and what becomes of them where there is no GPU.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from moesaic.actors.router import connections
from moesaic.actors.router.layer_tensors import LayerTensors
from moesaic.actors.router.router import Router
from moesaic.cluster.expert_keys import ExpertKey
from moesaic.cluster.placement import HostEntry, LayerPlacement, Placement, PlacementId, Replica
from moesaic.cluster.routing.events import Send
from tests.helpers.pool.serving import KEY, LAYER, PATIENT, assert_right, inputs, serving
from tests.helpers.pool.transports import DEADLINE_S, process, settles

KEY_0 = ExpertKey("m", LAYER, 0)


def router_on_cuda() -> Router:
    return Router(
        name="test",
        node="here",
        policy=PATIENT,
        transport="device",
        device=torch.device("cuda"),
    )


def test_device_memory_that_cannot_be_had_falls_back_to_the_hosts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As between processes of GPUs where CUDA declines: here there is none."""
    if torch.cuda.is_available():
        pytest.skip("CUDA would not decline")
    monkeypatch.setattr(connections, "device_name", lambda _: "GPU-1")
    with serving(folder) as pool, closing(router_on_cuda()) as router:
        hosts = {n: replace(e, device="GPU-1") for n, e in pool.placement.hosts.items()}
        router.place(Placement(PlacementId(1, 2), hosts, pool.placement.layers))
        router.wait_ready(DEADLINE_S)
        assert router.stats().transports == dict.fromkeys(hosts, "shm")
        x, ids, weights = inputs(40)
        assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))


def test_a_call_is_written_on_a_device_as_on_the_cpu() -> None:
    x, ids, weights = inputs(9, 3)
    job = LayerTensors(KEY, None, x, ids, weights)
    for rows in (range(9), [1, 4, 8]):
        token_t = np.array(rows)
        assignment_tk = token_t[:, None] * 3 + np.array([0, 2])
        assignment_tk[0, 1] = -1
        sent = Send(
            1,
            PlacementId(1, 1),
            "h",
            1,
            5,
            1.0,
            0,
            1,
            (),
            token_t,
            assignment_tk,
            ids_of(ids, assignment_tk),
            assignment_tk[assignment_tk >= 0],
        )
        frame, layout = job.frame(sent)
        on_cpu, on_device = (torch.zeros(layout.call_bytes, dtype=torch.uint8) for _ in range(2))
        job.write(sent, frame, layout, on_cpu)
        job.write_on_device(sent, layout, on_device)
        assert torch.equal(on_cpu, on_device)


def ids_of(ids_TK: Tensor, assignment_tk: np.ndarray) -> np.ndarray:
    flat = ids_TK.reshape(-1).numpy()
    return np.where(assignment_tk >= 0, flat[assignment_tk], -1).astype(np.int32)


@pytest.mark.cuda
@pytest.mark.parametrize("exact", [False, True])
def test_device_memory_between_processes(folder: Path, exact: bool) -> None:
    """CUDA IPC has no way between two owners in one process: the host is another."""
    with (
        serving(folder, hosts=1, exact=exact) as pool,
        process("serve", str(folder), "other", "cuda") as (child, line),
        closing(router_on_cuda()) as router,
    ):
        entry = HostEntry(**json.loads(line))
        there = (Replica(entry.host, 1.0),)
        layers = {
            key: LayerPlacement((there,) * len(layer.replicas))
            for key, layer in pool.placement.layers.items()
        }
        hosts = {entry.host: entry}
        router.place(Placement(PlacementId(1, 2), hosts, layers, pool.placement.exact))
        router.wait_ready(DEADLINE_S)
        assert router.stats().transports == {entry.host: "cuda"}
        for tokens in (1, 7, 300):
            x, ids, weights = inputs(tokens, seed=tokens)
            given = router.forward(KEY, x.cuda(), ids.cuda(), weights.cuda())
            expected = pool.answer(x, ids, weights)
            torch.testing.assert_close(given.cpu(), expected, atol=1e-3, rtol=1e-3)
        child.kill()
        with router.expecting([KEY_0]):
            assert settles(lambda: not router.has([KEY_0]))
