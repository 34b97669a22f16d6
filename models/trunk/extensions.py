"""Architectures that installed packages bring, found by entry point.

An entry of the group `moesaic.architectures` leads to an `Architecture`. Its name is the
``model_type``, or the name of the model's class, for a config.json that has another model's
``model_type`` and this class in ``architectures``. The packages' metadata are read when a model is
not known to transformers. A package is imported when its own model is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from threading import RLock

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from ...proto.errors import UnsupportedModel, describe_error
from .architecture import Adapter, Architecture

GROUP = "moesaic.architectures"
# Names of entries in this repository's own extension, so that an error can say what is missing.
OURS = ("grok-1", "openmoe", "OpenMoeForCausalLM")

_lock = RLock()  # several threads may read models at once
_registered: dict[str, Architecture] = {}  # by name of entry


def find_class(class_name: str) -> Architecture | None:
    """Return and register the architecture whose model class is ``class_name``.

    Returns None for a class of transformers, and where no package has an entry of this name. Raises
    UnsupportedModel, as `find` does.
    """
    is_theirs = class_name in vars(transformers)["__all__"]  # `dir` takes 0.3 s
    return None if is_theirs else _find(class_name)


def find(model_type: str) -> Architecture | None:
    """Return the architecture of ``model_type``, and register it with transformers.

    Returns None for a type of transformers, and where no package has an entry of this name. Raises
    UnsupportedModel where a package has a broken entry, or more than one has it, or this
    repository's own extension is not installed.
    """
    is_theirs = model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type].__module__.startswith(
        "transformers."
    )
    return None if is_theirs else _find(model_type)


def adapters(model_type: str) -> Mapping[str, Adapter]:
    """Return the adapters of an architecture that was found; empty for all others."""
    found = _registered.get(model_type)
    return {} if found is None else found.adapters


def _find(name: str) -> Architecture | None:
    with _lock:
        if name not in _registered:
            entry = _entry(name)
            if entry is None:
                return None
            found = _load(entry)
            _register(found)
            _registered[name] = _registered[found.model_type] = found
        return _registered[name]


def _entry(name: str) -> EntryPoint | None:
    entries = list(entry_points(group=GROUP, name=name))
    if len(entries) > 1:
        raise UnsupportedModel(
            f"model_type: {name!r} is provided by {' and by '.join(sorted(map(_owner, entries)))}; "
            "uninstall all but one"
        )
    if not entries and name in OURS:
        raise UnsupportedModel(
            f"model_type: {name!r} is provided by the package moesaic-architectures, which is not "
            "installed; run `pip install ./extensions/architectures` in Moesaic's repository"
        )
    return entries[0] if entries else None


def _owner(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.value


def _load(entry: EntryPoint) -> Architecture:
    where = f"model_type: {entry.name!r} is provided by {_owner(entry)}, whose {entry.value}"
    try:
        found: object = entry.load()
    except Exception as error:  # a package's code may raise anything
        raise UnsupportedModel(
            f"{where} cannot be imported: {describe_error(error)}; repair or uninstall the package"
        ) from error
    if not isinstance(found, Architecture):
        raise UnsupportedModel(
            f"{where} is of type {type(found).__name__}, not an Architecture; repair or uninstall "
            "the package"
        )
    if entry.name not in (found.model_type, found.model.__name__):
        raise UnsupportedModel(
            f"{where} is of model_type {found.model_type!r} and class {found.model.__name__!r}; "
            "the package must name its entry like one of them"
        )
    return found


def _register(found: Architecture) -> None:
    # The package may have done the same when it was imported.
    AutoConfig.register(found.model_type, found.config, exist_ok=True)
    AutoModelForCausalLM.register(found.config, found.model, exist_ok=True)
    if found.conversions:
        register_checkpoint_conversion_mapping(
            found.model_type, list(found.conversions), overwrite=True
        )
