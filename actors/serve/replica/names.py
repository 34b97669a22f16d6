"""The names of a cluster's applications and deployments on Ray Serve.

An application is named after the cluster's namespace (the ingress), or after the namespace and a
model (the model's trunks). No cluster's name has a colon, but a model's may.
"""

from __future__ import annotations

# The name of the deployment of an ingress.
INGRESS = "Ingress"


def trunk_app(namespace: str, model: str) -> str:
    """Return the name of the application of a model's trunks."""
    return f"{namespace}:{model}"


def app_namespace(app: str) -> str:
    """Return the namespace of the cluster to which an application belongs, if it is Moesaic's."""
    return app.partition(":")[0]


def app_model(app: str) -> str | None:
    """Return the model whose trunks an application has; None: it is an ingress."""
    return app.partition(":")[2] or None


def trunk_name(model: str) -> str:
    """Return the name of the deployment of a model's trunks."""
    return f"Trunk-{model}"


def model_of(deployment: str) -> str:
    """Return the model whose trunks a deployment has, the inverse of `trunk_name`."""
    return deployment.removeprefix("Trunk-")
