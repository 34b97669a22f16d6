"""The one tree of errors.

They cross the wire by name::

    MoesaicError
    |-- BadInput                 the caller's mistake: never retried
    |   |-- SpecError            the YAML spec
    |   |-- RequestError         an HTTP or SDK request
    |   |   |-- UnknownModel
    |   |   `-- BodyTooLarge
    |   |-- CallError            an expert call: shapes, dtypes, sizes
    |   |-- CheckpointError      a file: truncated, missing tensors, wrong shapes
    |   |-- UnsupportedModel     an architecture without the experts interface
    |   |-- Unauthenticated      a peer or client shows no proof, or a wrong one, of who it is
    |   `-- Forbidden            it may not do this
    |-- Retryable                nothing is lost: the same call may succeed elsewhere or later
    |   |-- NotHere              this host does not hold the expert, or is another incarnation
    |   |-- Busy                 a bounded queue is full
    |   |-- Expired              the deadline passed before the work was done
    |   |-- NoAnswer             a part of the cluster is too slow, or being restarted
    |   |-- Ending               the service ends, and takes nothing new
    |   |-- HostLost             a host's connection ended
    |   |-- Corrupted            bytes changed on the way
    |   |-- Interrupted          an answer cannot go on where it was
    |   |-- Overloaded           the endpoint holds as many requests, or bytes of them, as it may
    |   `-- SlowBody             the body of a request did not arrive in time
    |-- ExpertUnavailable        no replica of an expert answered before the deadline
    |-- BadExpert                an expert produced values that are not finite
    |-- EngineError              the trunk's engine failed or was restarted
    |-- ClusterError             Ray, processes, ports: the pool could not be started or reached
    |   `-- Superseded           a newer controller rules
    `-- InternalError            a defect of ours
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath
from typing import ClassVar


class MoesaicError(Exception):
    """Something failed.

    Base of every error that Moesaic raises on purpose. ``retryable`` says whether the same request
    may succeed when it is sent again; ``http_status`` is what the endpoint answers with. The first
    line of a class's docstring is what its errors say that were given no message.

    ``for_clients``: its messages are written for clients outside of the cluster. Those of all other
    classes may name hosts, addresses, files and classes, and stay in the logs (`words_for_client`).
    """

    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500
    for_clients: ClassVar[bool] = False

    @property
    def code(self) -> str:
        return type(self).__name__

    def __str__(self) -> str:
        text = super().__str__()
        return text if text.strip() else _first_line(type(self))


class BadInput(MoesaicError):
    """What was given cannot be used."""

    http_status = 400


class SpecError(BadInput):
    """The spec has an unknown key or an impossible value.

    The message gives the key's path.
    """


class RequestError(BadInput):
    """An HTTP or SDK request is malformed.

    ``param`` names the field.
    """

    for_clients = True

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownModel(RequestError):
    """There is no such model."""

    http_status = 404


class BodyTooLarge(RequestError):
    """The body of a request has more bytes than are allowed."""

    http_status = 413


class CallError(BadInput):
    """An expert call has wrong shapes, dtypes or sizes; nothing was computed."""

    for_clients = True


class CheckpointError(BadInput):
    """A checkpoint is truncated, incomplete or of another shape than its configuration."""


class UnsupportedModel(BadInput):
    """The architecture does not dispatch its experts through transformers' experts interface."""


class Unauthenticated(BadInput):
    """A peer or a client did not prove that it may connect.

    It shows no key or proof, or a wrong one.
    """

    for_clients = True
    http_status = 401


class Forbidden(BadInput):
    """Whoever asks for this may not have it."""

    for_clients = True
    http_status = 403


class Retryable(MoesaicError):
    """It did not work this time, and nothing is lost: send it again."""

    retryable = True
    http_status = 503


class NotHere(Retryable):
    """The host does not hold the expert, or is another incarnation than the call meant."""


class Busy(Retryable):
    """A bounded queue is full; send it again later or elsewhere.

    After ``retry_after_s``, if that is known.
    """

    for_clients = True
    http_status = 429
    retry_after_s: float | None = None


class Expired(Retryable):
    """The deadline passed before the work was done; it was dropped, not computed."""

    for_clients = True
    http_status = 504


class NoAnswer(Retryable):
    """A part of the cluster did not answer in time; ask again."""


class Ending(Retryable):
    """The service is ending; send it again, elsewhere or later."""

    for_clients = True


class HostLost(Retryable):
    """The connection to a host ended with calls in flight."""


class Corrupted(Retryable):
    """A call or an answer is not what was sent: its checksum says so."""

    for_clients = True


class Interrupted(Retryable):
    """An answer stopped, and cannot go on where it was: it must be asked for again, whole."""

    for_clients = True


class Overloaded(Retryable):
    """The endpoint holds as many requests, or bytes of them, as it may; send it again later."""

    for_clients = True


class SlowBody(Retryable):
    """The body of a request did not arrive in time."""

    http_status = 408
    for_clients = True


class ExpertUnavailable(MoesaicError):
    """No replica of an expert answered before the deadline.

    The message names the expert. ``is_back``, where a router in this process raised it: whether
    another try is worthwhile now.
    """

    for_clients = True
    retryable = True
    http_status = 503
    is_back: Callable[[], bool] | None = None


class BadExpert(MoesaicError):
    """An expert's output is not finite.

    The message names the expert.
    """

    for_clients = True


class EngineError(MoesaicError):
    """The trunk's engine failed; it is restarted, and the request may be sent again."""

    retryable = True
    http_status = 503


class ClusterError(MoesaicError):
    """The pool could not be started or reached."""


class Superseded(ClusterError):
    """A newer controller rules; the one that asked has to end."""


class InternalError(MoesaicError):
    """A defect of Moesaic's; its log has more.

    The message holds the foreign error's text (`in_words`).
    """


def _tree(cls: type[MoesaicError]) -> dict[str, type[MoesaicError]]:
    found = {cls.__name__: cls}
    for sub in cls.__subclasses__():
        found |= _tree(sub)
    return found


ERRORS: dict[str, type[MoesaicError]] = _tree(MoesaicError)


def _first_line(cls: type[MoesaicError]) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]


def words_for_client(error: MoesaicError, request_id: str = "") -> str:
    """What a client outside of the cluster is told: the message, where it was written for clients,
    else what the class says in general and the id by which the log has the message."""
    if error.for_clients:
        return str(error)
    general = _first_line(type(error))
    return f"{general} (request {request_id})" if request_id else general


def in_words(error: BaseException) -> str:
    """The type and the message of any exception: "KeyError: 'x'". One that has no message, as a
    TimeoutError or a bare assertion, says where it was raised."""
    name, text = type(error).__name__, str(error).strip()
    if text:
        return f"{name}: {text}"
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return name
    return f"{name} in {PurePath(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"


def from_wire(code: str, message: str) -> MoesaicError:
    """The error that ``code`` names, or an InternalError that says which code was unknown."""
    cls = ERRORS.get(code)
    return cls(message) if cls else InternalError(f"{code}: {message}")
