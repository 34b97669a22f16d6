"""Check the folder of a model's updates before anything starts; no tensor is read."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from ...cluster.spec.spec import Spec
from ...cluster.update_folder import UpdateFolder
from ...cluster.versions import WeightVersions
from ...models.folder.expert_file import shapes_of_experts
from ...models.trunk.config import read_config
from ...models.trunk.experts_layers import expert_shapes, experts_layers
from ...models.trunk.trunk import meta_model
from ...proto.errors import CheckpointError
from .findings import Finding, finding_of

Shapes = dict[str, tuple[int, ...]]


def check_updates(updates: str, model: str, folder: Path, *, key: str) -> list[Finding]:
    """Return what is wrong with the updates of the model in ``folder``."""
    path = update_path(updates)
    if not path.exists():
        above = next(parent for parent in path.parents if parent.exists())
        if not os.access(above, os.W_OK | os.X_OK):
            return [_error(key, f"{path} cannot be made: {above} cannot be written")]
        return []
    if not path.is_dir():
        return [_error(key, f"{path} is not a folder; give the folder for the model's updates")]
    if not os.access(path, os.W_OK | os.X_OK):
        return [_error(key, f"{path} cannot be written, so no update could be kept in it")]
    try:
        return list(_check_weights(UpdateFolder(path, model), folder, key))
    except CheckpointError as error:
        return [finding_of(error, key)]


def check_update_folders(spec: Spec) -> Iterator[Finding]:
    """Check that no two models keep their updates in one folder."""
    places: dict[Path, str] = {}
    for number, model in enumerate(spec.models):
        key = f"models.{number}.updates"
        if model.updates is not None:
            other = places.setdefault(update_path(model.updates), key)
            if other != key:
                yield _error(key, f"{other} is the same folder; give each model its own")


def update_path(updates: str) -> Path:
    """Return the folder that the spec's `updates` names."""
    return Path(updates).expanduser().resolve()


def _check_weights(updates: UpdateFolder, folder: Path, key: str) -> Iterator[Finding]:
    """Check that each expert that will be served fits the model, by the files' headers."""
    served = WeightVersions()
    for update in updates.updates():
        served = served.updated(update.versions)
    if not served.experts:
        return
    layers = {layer.layer: layer for layer in experts_layers(meta_model(read_config(folder)))}
    files: dict[Path, list[tuple[int, int]]] = defaultdict(list)
    for (_, layer, expert), version in served.experts.items():
        files[updates.weights(version)].append((layer, expert))
    for file, places in sorted(files.items()):
        if not file.is_file():
            yield _error(key, f"{file} is missing, which a record names")
            continue
        found = shapes_of_experts(file)
        for layer, expert in sorted(places):
            wanted: Shapes | None = None
            if layer in layers and expert < layers[layer].num_experts:
                wanted = expert_shapes(layers[layer])
            shapes = found.get((layer, expert))
            if wanted is None or shapes != wanted:
                yield _error(key, _misfit(file, layer, expert, shapes, wanted))
                break  # the others of the file have most likely the same error


def _misfit(
    file: Path, layer: int, expert: int, found: Shapes | None, wanted: Shapes | None
) -> str:
    which = f"expert {expert} of layer {layer}"
    if wanted is None:
        return f"{file} has {which}, which the model lacks; it belongs to another model"
    if found is None:
        return f"{file} lacks {which}; the file is not the one that was written with its record"
    return f"{file}: {which} has tensors {found}, but the model takes {wanted}"


def _error(key: str, message: str) -> Finding:
    return Finding(severity="error", path=key, message=message, code=CheckpointError.__name__)
