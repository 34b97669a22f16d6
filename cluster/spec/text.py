"""A spec as text: reading it, overriding it from the environment, and describing its errors."""

from __future__ import annotations

import re
import reprlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import ValidationError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B")
_POWERS = ("", "K", "M", "G", "T")
_OVERRIDE = "MOESAIC__"
# Keys that had another name before: (section, old key) -> new key.
OLD_KEYS = {
    ("autoscale", "high"): "scale_up_above",
    ("autoscale", "low"): "scale_down_below",
    ("balance", "enough"): "rebalance_below",
    ("balance", "fan_out"): "consolidate_below",
    ("balance", "gone_s"): "host_timeout_s",
    ("balance", "load_mb_per_s"): "loading_mb_per_s",
    ("hosts", "domain"): "failure_domain",
    ("hosts", "spread"): "placement_group",
}


def bytes_of(text: str) -> int:
    """Return how many bytes "4GB" or "512 MiB" are; raises ValueError."""
    found = _SIZE.fullmatch(text.strip())
    size = 0
    if found is not None:
        number, prefix, binary = found.groups()
        size = int(float(number) * (1024 if binary else 1000) ** _POWERS.index(prefix.upper()))
    if size < 1:
        raise ValueError(f"{text!r} is not a size in bytes; write it as 4GB or 512MiB")
    return size


def part_or_bytes(value: Any) -> float | str:
    """Check a number in (0, 1] or a text that `bytes_of` reads; raises ValueError."""
    if isinstance(value, str):
        bytes_of(value)
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError("expected a fraction in (0, 1], or bytes such as 4GB")
    return float(value)


def overridden(values: Any, environment: Mapping[str, str]) -> Any:
    """Return a spec's plain values with overrides from the environment.

    Names are as in ``MOESAIC__ENDPOINT__PORT=9000``, or ``MOESAIC__HOSTS__0__COUNT=4`` in a list.
    Values are YAML. Raises ValueError.
    """
    for name, text in sorted(environment.items()):
        if not name.startswith(_OVERRIDE):
            continue
        keys = name.removeprefix(_OVERRIDE).lower().split("__")
        try:
            values = _with(values, keys, yaml.load(text, Loader=StrictLoader))
        except (yaml.YAMLError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{name}: {' '.join(str(error).split())}") from None
    return values


def _with(values: Any, keys: list[str], new: Any) -> Any:
    if not keys:
        return new
    if isinstance(values, list):
        at = int(keys[0])
        if not 0 <= at < len(values):
            raise IndexError(f"the list has no entry {at}; its entries are 0 to {len(values) - 1}")
        return [_with(old, keys[1:], new) if n == at else old for n, old in enumerate(values)]
    if values is not None and not isinstance(values, dict):
        raise TypeError(f"the value {values!r} is not a mapping, so it has no key {keys[0]!r}")
    values = values or {}
    return {**values, keys[0]: _with(values.get(keys[0]), keys[1:], new)}


def problems(error: ValidationError, values: dict[Any, Any]) -> str:
    """Describe a validation error with one clause for each wrong path."""
    texts: dict[str, list[str]] = defaultdict(list)
    given: dict[str, str] = {}
    for problem in error.errors(include_url=False, include_context=False):
        path = _path(problem["loc"], values)
        match problem["type"]:
            case "extra_forbidden":
                text = _unknown_key(problem["loc"])
            case "model_type" | "model_attributes_type":
                text = "it has keys of its own, and is no single value"
            case _:
                text = problem["msg"].removeprefix("Value error, ")
        texts[path].append(text)
        if path and problem["type"] != "missing":
            given[path] = f" (got {_short(problem['input'])})"
    return "; ".join(
        (f"{path}: " if path else "") + " or ".join(found) + given.get(path, "")
        for path, found in texts.items()
    )


def _unknown_key(loc: tuple[int | str, ...]) -> str:
    new = OLD_KEYS.get((str(loc[0]), str(loc[-1])))
    return "unknown key" if new is None else f"unknown key; it was renamed to {new}"


def _path(loc: tuple[int | str, ...], values: Any) -> str:
    """Return the keys of ``loc``, without the union members that pydantic appends to them."""
    steps = []
    for step in loc:
        if not isinstance(values, dict | list | tuple):
            break
        steps.append(str(step))
        try:
            values = values[step]  # pyright: ignore[reportArgumentType, reportCallIssue]
        except (LookupError, TypeError):
            values = None
    return ".".join(steps)


def _short(value: Any) -> str:
    # With YAML aliases a few lines can expand to an enormous value.
    text = reprlib.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class StrictLoader(yaml.SafeLoader):
    """A YAML loader that rejects duplicate keys; PyYAML's own silently takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (k for k, _ in node.value if isinstance(k, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def flowing(text: str) -> str:
    """Return a docstring as Markdown: one line for each paragraph, and no doubled backquotes."""
    paragraphs = text.replace("``", "`").split("\n\n")
    return "\n\n".join(" ".join(one.split()) for one in paragraphs)
