"""Read request bodies: bound the bytes held, of one body and of all, and the time one may take.

A body counts with the bytes that arrived, not with those that it announced, from the first byte
until it is parsed. So a client that announces much and sends nothing takes no room. When there is
no room left, the body that has been arriving longest is dropped, if it has taken longer than an
honest client needs. So clients that hold bodies back lose their own connections, and other clients
keep their answers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import Request

from ....cluster.spec.parts import LimitSpec
from ....proto.errors import BodyTooLarge, Overloaded, SlowBody

T = TypeVar("T")

# How many bodies may be arriving; less than Serve admits to the ingress (`trunk.MAX_ONGOING`).
MOST_ARRIVING = 1024
# A body that has been arriving for longer may be dropped to make room.
_PROMPT_S = 1.0
# Larger bodies are parsed one at a time: Python's objects take many times the bytes of their JSON.
_LARGE_BYTES = 256 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyLimits:
    each_bytes: int
    all_bytes: int
    arrive_s: float
    most: int = MOST_ARRIVING

    @classmethod
    def of(cls, spec: LimitSpec) -> BodyLimits:
        return cls(
            each_bytes=int(spec.body_mb * 1e6),
            all_bytes=int(spec.bodies_mb * 1e6),
            arrive_s=spec.body_s,
        )


@dataclass(slots=True, eq=False)
class _Body:
    began: float
    deadline: asyncio.Timeout
    size: int = 0
    pushed_out: bool = False


class Bodies:
    """The bodies that one server is receiving or parsing."""

    def __init__(self, limits: BodyLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits  # others may be set at any time
        self._clock = clock
        self._arriving: dict[_Body, None] = {}  # the oldest first
        self._held_bytes = 0
        self._large = asyncio.Lock()

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    async def parsed(self, request: Request, parse: Callable[[bytes], T]) -> T:
        """Read the body and return ``parse(body)``, computed in a thread.

        Raises BodyTooLarge before more than one body's bytes are in memory, Overloaded
        before all bodies together exceed their limit, SlowBody, and what ``parse`` raises.
        """
        declared = request.headers.get("content-length", "0")
        most = self.limits.each_bytes
        if not (declared.isascii() and declared.isdigit()) or int(declared) > most:
            raise BodyTooLarge(
                f"the body has {declared} bytes; at most {most} are allowed "
                "(endpoint.limits.body_mb)"
            )
        body = _Body(self._clock(), asyncio.timeout(self.limits.arrive_s))
        self._admit(body, int(declared))
        try:
            data = await self._read(request, body)
            if len(data) <= _LARGE_BYTES:
                return await asyncio.to_thread(parse, data)
            async with self._large:
                return await asyncio.to_thread(parse, data)
        finally:
            self._let_go(body)

    async def _read(self, request: Request, body: _Body) -> bytes:
        data = bytearray()
        try:
            async with body.deadline:
                async for chunk in request.stream():
                    self._take(body, len(chunk))
                    data += chunk
        except TimeoutError:
            if body.pushed_out:
                raise self._overloaded() from None
            raise SlowBody(
                f"the body did not arrive within {self.limits.arrive_s:g} s "
                "(endpoint.limits.body_s); send the request again"
            ) from None
        finally:
            self._arriving.pop(body, None)
        return bytes(data)

    def _admit(self, body: _Body, declared: int) -> None:
        self._make_room(declared, bodies=1)
        self._arriving[body] = None

    def _take(self, body: _Body, new: int) -> None:
        if body.size + new > self.limits.each_bytes:
            raise BodyTooLarge(
                f"the body has more than {self.limits.each_bytes} bytes, the most that are "
                "allowed (endpoint.limits.body_mb)"
            )
        self._make_room(new, keep=body)
        body.size += new
        self._held_bytes += new

    def _make_room(self, new: int, *, bodies: int = 0, keep: _Body | None = None) -> None:
        """Drop old bodies until the new bytes fit, and ``bodies`` more bodies.

        Raises Overloaded if they cannot. ``keep`` is not dropped.
        """
        now, limits = self._clock(), self.limits

        def lacks() -> bool:
            full = len(self._arriving) + bodies > limits.most
            return full or self._held_bytes + new > limits.all_bytes

        for old in list(self._arriving) if lacks() else ():
            if now - old.began < _PROMPT_S:
                break
            # Dropping a body without bytes helps if there are too many bodies, not too many bytes.
            if old is not keep and (old.size or len(self._arriving) + bodies > limits.most):
                self._push_out(old)
                if not lacks():
                    break
        if lacks():
            raise self._overloaded()

    def _push_out(self, body: _Body) -> None:
        body.pushed_out = True
        del self._arriving[body]
        self._let_go(body)
        if not body.deadline.expired():
            body.deadline.reschedule(0.0)

    def _let_go(self, body: _Body) -> None:
        self._held_bytes -= body.size
        body.size = 0

    def _overloaded(self) -> Overloaded:
        return Overloaded(
            "the endpoint holds as many request bodies as it may (endpoint.limits.bodies_mb); "
            "send the request again later"
        )
