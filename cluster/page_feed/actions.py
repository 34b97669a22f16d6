"""What operators may ask for on the page: the body of each request, and the call that it makes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...proto.errors import RequestError

# The largest body is far below: names are bounded.
BODY_BYTES = 8192
# The initiator of its changes, in `moesaic history`.
WHO = "page"

_Name = Annotated[str, Field(min_length=1, max_length=200)]
_Number = Annotated[int, Field(ge=0, le=1_000_000)]


class Action(BaseModel):
    """An action's fields."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def call(self) -> tuple[str, tuple[Any, ...]]:
        """Return the controller's method and its arguments."""
        raise NotImplementedError


class _Expert(Action):
    model: _Name
    layer: _Number
    expert: _Number

    @property
    def key(self) -> tuple[str, int, int]:
        return self.model, self.layer, self.expert


class Plan(Action):
    budget: Annotated[int, Field(ge=1, le=1_000_000)] | None = None

    def call(self) -> tuple[str, tuple[Any, ...]]:
        return "plan", (self.budget,)


class Rebalance(Plan):
    def call(self) -> tuple[str, tuple[Any, ...]]:
        return "rebalance", (self.budget, WHO)


class Rollback(Action):
    change: Annotated[int, Field(ge=1)]

    def call(self) -> tuple[str, tuple[Any, ...]]:
        return "rollback", (self.change,)


class Drain(Action):
    host: _Name

    def call(self) -> tuple[str, tuple[Any, ...]]:
        return "drain", (self.host, WHO)


class Undrain(Drain):
    def call(self) -> tuple[str, tuple[Any, ...]]:
        return "undrain", (self.host, WHO)


class Pin(_Expert):
    host: _Name

    def call(self) -> tuple[str, tuple[Any, ...]]:
        return "pin", (self.key, self.host, WHO)


class Unpin(Pin):
    def call(self) -> tuple[str, tuple[Any, ...]]:
        return "unpin", (self.key, self.host, WHO)


class Replicate(_Expert):
    replicas: Annotated[int, Field(ge=1, le=10_000)]

    def call(self) -> tuple[str, tuple[Any, ...]]:
        return "replicate", (self.key, self.replicas, WHO)


class Scale(Action):
    group: _Number
    hosts: Annotated[int, Field(ge=1, le=100_000)]

    def call(self) -> tuple[str, tuple[Any, ...]]:
        return "scale", (self.hosts, self.group, WHO)


ACTIONS: dict[str, type[Action]] = {
    "plan": Plan,
    "rebalance": Rebalance,
    "rollback": Rollback,
    "drain": Drain,
    "undrain": Undrain,
    "pin": Pin,
    "unpin": Unpin,
    "replicate": Replicate,
    "scale": Scale,
}


def parsed_action(name: str, body: bytes) -> Action:
    """Read the body of a request for the action ``name``. Raises RequestError."""
    try:
        return ACTIONS[name].model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the body"
        raise RequestError(f"{field}: {first['msg']}", param=field) from None
