"""What a Ray that starts here is told about the machine; it is not started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from moesaic.actors.runtime import ray_border
from moesaic.actors.runtime.embedded_ray import EmbeddedRay
from moesaic.cluster.spec.spec import parse_spec


@pytest.mark.parametrize(
    ("visible", "wanted"),
    [(None, None), ("", None), ("0,1", None), ("GPU-a", None), ("MIG-a,MIG-b", 2)],
)
def test_every_instance_of_a_gpu_is_one_of_rays_gpus(
    visible: str | None, wanted: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a number Ray counts by itself, and takes instances for one GPU."""
    told: list[dict[str, Any]] = []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def start(said: object, **options: Any) -> EmbeddedRay:
        told.append(options)
        return EmbeddedRay("127.0.0.1:1", Path("/r"))

    monkeypatch.setattr(ray_border, "start_embedded", start)
    monkeypatch.setattr(ray_border, "join_ray", lambda *_, **__: None)
    assert ray_border.start_ray(parse_spec({}))
    assert [one["num_gpus"] for one in told] == [wanted]
