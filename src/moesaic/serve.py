"""A cluster as an application of Ray Serve, for `serve deploy` and KubeRay's RayService.

applications:
  - name: moesaic-local          # moesaic- and the name of the cluster
    route_prefix: /
    import_path: moesaic.serve:build
    args:                        # the spec
      models:
        - {name: demo, path: demo}
"""

from __future__ import annotations

from typing import Any


def build(args: dict[str, Any]) -> Any:
    """Begin a cluster, or let the one of this name follow another spec; return its ingress.

    ``args`` has the keys of a spec. The Ray and the HTTP address are those of the Serve that calls
    this, whatever ``ray``, ``endpoint.host`` and ``endpoint.port`` say. Trunks are applications of
    their own, which change without each other. Raises RayServeException with what is wrong, which
    `serve status` shows; the cluster is as it was then.
    """
    from .actors.serve.built import built

    return built(args)
