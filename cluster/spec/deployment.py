"""What a cluster is to be: its spec, and what was found out about the spec's models.

A controller that starts anew knows the cluster from this record alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from ...proto.errors import ClusterError
from ..placement import ModelRef, ModelShape
from .spec import Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A cluster as it was last asked for."""

    id: str  # another one for each cluster, whatever its name
    spec: Spec
    models: Sequence[tuple[ModelRef, ModelShape]]  # those of the spec, in its order
    router: str | None = None  # host:port of the router service

    def to_json(self) -> str:
        return _FORM.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Deployment:
        """Read what `to_json` wrote. Raises ClusterError for the text of another version."""
        try:
            return _FORM.validate_json(text)
        except ValidationError as error:
            raise ClusterError(
                f"the cluster's stored state is not of this version of Moesaic ({error}); end the "
                "cluster with the version that started it"
            ) from error


_FORM = TypeAdapter(Deployment)
