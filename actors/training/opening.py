"""Opens a run over a pool on Ray: what it trains is what an optimizer has in its groups."""

from __future__ import annotations

import getpass
import math
from collections.abc import Collection, Iterable, Mapping

import ray
import torch

from ...cluster.expert_keys import SHARED, ExpertKey, trunk_block
from ...cluster.training.host_memory import TrainedBytes
from ...cluster.training.run_plan import RunPlan, Trained
from ...cluster.training.runs import TrainingRequest
from ...cluster.training.steps import TrainingSteps
from ...kernels.training.update_rules import OwnerBytes, UpdateRule
from ...models.training.groups import TrainedTensors
from ...models.training.trunk_blocks import trunk_blocks
from ...models.trunk.experts_layers import ExpertsLayer, expert_shapes, shared_shapes
from ...proto.wire import wide
from ..store.cluster_secret import secret_of
from ..transport.bulk.links import BulkLinks
from .lead.coordinator import Coordinator
from .lead.ray_pool import RayTrainingPool
from .lead.run_actor import RemoteCoordinator, begin_run, run_name, start_run_actor
from .run import LearningTrunk, PoolRun
from .run_options import RunOptions


def open_run(
    namespace: str,
    model: str,
    trunk: LearningTrunk,
    layers: Iterable[ExpertsLayer],
    trained: TrainedTensors,
    rule: UpdateRule,
    options: RunOptions,
) -> PoolRun:
    """Begin to train a model of a cluster, or take part; ``layers`` are as in `plan_run`.

    Raises ClusterError.
    """
    redundancy, exact, succeed, crew = options
    if exact is None:
        placement = trunk.learning.router.placement
        exact = placement is not None and model in placement.exact
    asked = TrainingRequest(model, getpass.getuser(), succeed, crew.workers)
    begun = begin_run(namespace, asked)
    pool = RayTrainingPool(namespace, begun.run, model)
    links = BulkLinks(ray.get_runtime_context().get_node_id(), secret_of(namespace))
    try:
        plan = plan_run(
            begun.run,
            model,
            trunk,
            layers,
            trained,
            rule,
            redundancy=begun.redundancy if redundancy is None else redundancy,
            exact=exact,
        )
        if crew.workers > 1:
            start_run_actor(namespace, begun, plan, crew.workers)
            lead = RemoteCoordinator(namespace, run_name(begun), plan)
        else:
            versions, number = begun.versions, begun.next_version
            steps = TrainingSteps(plan, pool.now(), versions=versions, next_version=number)
            lead = Coordinator(pool, steps, since=begun.since)
    except BaseException:
        links.close()
        if begun.since is None and crew.workers == 1:
            pool.end()
        raise
    return PoolRun(lead, links, trunk, name=crew.name)


def plan_run(
    run: int,
    model: str,
    trunk: LearningTrunk,
    layers: Iterable[ExpertsLayer],
    trained: TrainedTensors,
    rule: UpdateRule,
    *,
    redundancy: int,
    exact: bool,
) -> RunPlan:
    """Return the plan of a run that trains ``trained``, under keys of ``model``.

    ``layers`` are those of the trunk's model with its experts' parameters.
    """
    dtype = trunk.learning.dtype
    tensors: dict[ExpertKey, Trained] = {}
    for layer in layers:
        shapes, shared = expert_shapes(layer), shared_shapes(layer)
        groups = trained.experts.get(layer.layer, {})
        # Experts of which nothing is trained have owners, too: each step is a version of them all.
        names = {name: group for name, group in groups.items() if name not in shared}
        own = Trained(
            groups=names,
            memory=_expert_bytes(rule, shapes, shared, names, dtype, exact=exact),
        )
        tensors |= {
            ExpertKey(model, layer.layer, expert): own for expert in range(layer.num_experts)
        }
        if of_all := {name: group for name, group in groups.items() if name in shared}:
            tensors[ExpertKey(model, layer.layer, SHARED)] = Trained(
                groups=of_all,
                memory=_owned_bytes(rule.bytes_of(shapes[name], dtype) for name in of_all),
            )
    parameters = dict(trunk.model.named_parameters())
    for number, groups in enumerate(trunk_blocks(trunk.model, trained.trunk)):
        own = [parameters[name] for name in groups]
        memory = _owned_bytes(rule.bytes_of(tuple(one.shape), one.dtype) for one in own)
        tensors[trunk_block(model, number)] = Trained(groups=groups, memory=memory)
    return RunPlan(
        run=run,
        model=model,
        optimizer=rule.name,
        settings=rule.values({}),
        tensors=tensors,
        redundancy=redundancy,
        exact=exact,
    )


def _expert_bytes(
    rule: UpdateRule,
    shapes: Mapping[str, tuple[int, ...]],
    shared: Collection[str],
    trained: Iterable[str],
    dtype: torch.dtype,
    *,
    exact: bool,
) -> TrainedBytes:
    """Return the sizes of one expert's tensors; hosts add up the gradients of its own."""
    parameters, wide_type = sum(map(math.prod, shapes.values())), wide(dtype)
    own = sum(math.prod(shape) for name, shape in shapes.items() if name not in shared)
    return _owned_bytes(rule.bytes_of(shapes[name], dtype) for name in trained)._replace(
        version=parameters * dtype.itemsize,
        gradient=own * wide_type.itemsize,
        added=own * (torch.float64 if exact else wide_type).itemsize,
    )


def _owned_bytes(tensors: Iterable[OwnerBytes]) -> TrainedBytes:
    owned = list(tensors)
    return TrainedBytes(
        master=sum(one.master for one in owned), state=sum(one.state for one in owned)
    )
