"""Opens a run over a pool on Ray: what it trains is what an optimizer has in its groups."""

from __future__ import annotations

import getpass
import math
from collections.abc import Iterable, Mapping

import ray

from ...cluster.expert_keys import SHARED, ExpertKey, trunk_block
from ...cluster.training.run_plan import RunPlan, Trained
from ...cluster.training.steps import TrainingSteps
from ...kernels.training.update_rules import UpdateRule
from ...models.training.groups import TrainedTensors
from ...models.training.trunk_blocks import trunk_blocks
from ...models.trunk.experts_layers import ExpertsLayer, expert_shapes, shared_shapes
from ...proto.wire import wide
from ..router.router import Router
from ..runtime.cluster_secret import secret_of
from ..runtime.ray_border import controller_of, ray_get
from ..transport.bulk.links import BulkLinks
from .ray_pool import RayTrainingPool
from .run import LearningTrunk, PoolRun

# A model that was asleep is placed again first.
_BEGIN_S = 90.0


def open_run(
    namespace: str,
    model: str,
    trunk: LearningTrunk,
    router: Router,
    layers: Iterable[ExpertsLayer],
    trained: TrainedTensors,
    rule: UpdateRule,
    *,
    redundancy: int | None = None,
    exact: bool = False,
) -> PoolRun:
    """Begin to train a model of a cluster; ``layers`` are as in `plan_run`.

    ``redundancy`` is how many hosts may be lost with what they own (None: as the spec says). Raises
    ClusterError.
    """
    who = getpass.getuser()
    asked = controller_of(namespace).begin_training.remote(model, who)
    begun = ray_get(asked, _BEGIN_S, f"beginning to train {model}")
    pool = RayTrainingPool(namespace, begun.run, model, router)
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
        versions, number = begun.versions, begun.next_version
        steps = TrainingSteps(plan, pool.now(), versions=versions, next_version=number)
    except BaseException:
        links.close()
        pool.end()
        raise
    return PoolRun(pool, links, trunk, steps)


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
    wide_bytes = wide(trunk.learning.dtype).itemsize
    tensors: dict[ExpertKey, Trained] = {}
    for layer in layers:
        shapes, shared = expert_shapes(layer), shared_shapes(layer)
        groups = trained.experts.get(layer.layer, {})

        def of(names: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]] = shapes) -> Trained:
            nbytes = sum(math.prod(shapes[name]) * wide_bytes for name in names)
            return Trained(groups=names, nbytes=nbytes)

        # Experts of which nothing is trained have owners, too: each step is a version of them all.
        own = of({name: group for name, group in groups.items() if name not in shared})
        of_all = of({name: group for name, group in groups.items() if name in shared})
        tensors |= {
            ExpertKey(model, layer.layer, expert): own for expert in range(layer.num_experts)
        }
        if of_all.groups:
            tensors[ExpertKey(model, layer.layer, SHARED)] = of_all
    parameters = dict(trunk.model.named_parameters())
    for number, groups in enumerate(trunk_blocks(trunk.model, trained.trunk)):
        nbytes = sum(
            parameters[name].numel() * wide(parameters[name].dtype).itemsize for name in groups
        )
        tensors[trunk_block(model, number)] = Trained(groups=groups, nbytes=nbytes)
    return RunPlan(
        run=run,
        model=model,
        optimizer=rule.name,
        settings=rule.values({}),
        tensors=tensors,
        redundancy=redundancy,
        exact=exact,
    )
