"""What an ingress is to serve: models, limits and addresses, which may change while it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from ray import serve
from ray.serve.handle import DeploymentHandle

from ....cluster.spec.deployment import DeployedModel, Deployment
from ....cluster.spec.monitoring import MonitoringSpec
from ....cluster.spec.parts import EndpointSpec
from ....cluster.spec.spec import ModelSpec
from ....models.folder.tokenizer import read_tokenizer
from ....proto.errors import ClusterError
from ...endpoint.http.monitoring_app import PoolSource
from ...engine.engine import ExpertBounds
from ...page.page_app import PageSource
from ...store.durable_state import stored_deployment
from .controller_link import ControllerMetrics, ControllerPage, ControllerStatus
from .monitoring_address import ClusterStatusSource
from .names import trunk_app, trunk_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """One model that an ingress serves."""

    trunk: DeploymentHandle
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    aliases: Sequence[str] = ()
    experts: ExpertBounds | None = None  # None: as its engine says


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressPlan:
    """All that an ingress serves. Models and the endpoint's limits may be others in the next plan.

    With ``cold_start_s`` trunks may scale to zero, and take that long to come back.
    """

    models: Mapping[str, ModelPlan]
    endpoint: EndpointSpec = field(default_factory=EndpointSpec)
    cold_start_s: float | None = None
    monitoring: MonitoringSpec | None = None  # its port must be set
    own_hosts: Collection[str] = ()  # by which clients are told to reach the endpoint
    status: ClusterStatusSource | None = None  # its answer is part of ``/status``
    page: PageSource | None = None  # what the page is about; None: no page
    pool: PoolSource | None = None  # adds the pool's metrics to ``/metrics``


@dataclass(frozen=True, slots=True)
class StoredPlan:
    """Finds the plan for a cluster's ingress in what the cluster was last asked to be."""

    namespace: str

    def __call__(self) -> IngressPlan:
        """Return the present plan. Raises ClusterError."""
        app = serve.get_replica_context().app_name
        if app != self.namespace:
            raise ClusterError(
                f"name: the application is called {app!r}; call it {self.namespace!r}, after the "
                "cluster, so that commands find it"
            )
        found = stored_deployment(self.namespace)
        place = None if found is None else found.endpoint
        if found is None or place is None or found.spec.endpoint is None:
            raise ClusterError(f"{self.namespace}: nothing says what its endpoint is to serve")
        spec, endpoint = found.spec, found.spec.endpoint
        controller = ControllerStatus(self.namespace)
        watched = spec.monitoring
        return IngressPlan(
            models={
                model.ref.name: self._model(asked, model)
                for asked, model in zip(spec.models, found.models, strict=True)
            },
            endpoint=endpoint.model_copy(update={"host": place.host}),
            cold_start_s=cold_start_s(found),
            monitoring=place.monitoring,
            own_hosts=place.own_hosts,
            status=controller,
            page=ControllerPage(self.namespace),
            pool=watched and ControllerMetrics(controller, spec.name, watched.hot_experts),
        )

    def _model(self, asked: ModelSpec, found: DeployedModel) -> ModelPlan:
        name = asked.name
        return ModelPlan(
            # It may be told of a trunk that Serve does not know yet.
            trunk=serve.get_deployment_handle(
                trunk_name(name), trunk_app(self.namespace, name), _check_exists=False
            ),
            tokenizer=partial(read_tokenizer, found.ref.path or ""),
            aliases=asked.aliases,
            experts=ExpertBounds(
                maximum=found.top_k,
                default=asked.experts_per_token,
                minimum=asked.min_experts_per_token,
            ),
        )


def fixed_part(deployment: Deployment) -> object:
    """Return what an ingress takes over when it starts; for more, there has to be another one."""
    spec, place = deployment.spec, deployment.endpoint
    assert spec.endpoint is not None and place is not None
    own = spec.endpoint
    watched = None if spec.monitoring is None else spec.monitoring.hot_experts
    return deployment.id, own.cors_origins, own.allowed_hosts, own.drain_s, place, watched


def cold_start_s(deployment: Deployment) -> float | None:
    """Return how long a trunk may take to come back, if trunks may scale to zero."""
    spec = deployment.spec
    return spec.timeouts.start_s if spec.trunk.min_replicas == 0 else None
