"""What an endpoint has for each model, found by the model's name or one of its aliases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


class ModelNames(Mapping[str, T]):
    """A mapping from names and aliases, which changes while the endpoint runs."""

    def __init__(
        self,
        models: Mapping[str, T] | None = None,
        aliases: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._named: dict[str, T] = {}
        self.set(models or {}, aliases or {})

    def set(self, models: Mapping[str, T], aliases: Mapping[str, Sequence[str]]) -> None:
        """Replace everything at once; ``aliases`` has more names for some of the models."""
        self._named = {
            name: found for own, found in models.items() for name in (own, *aliases.get(own, ()))
        }

    def __getitem__(self, name: str) -> T:
        return self._named[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)
