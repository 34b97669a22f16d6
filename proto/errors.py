"""The tree of all errors.

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
    |   |-- Unauthenticated      a peer or client shows no proof of who it is, or a wrong one
    |   `-- Forbidden            the client may not do this
    |-- Retryable                nothing is lost: the same call may succeed elsewhere or later
    |   |-- NotHere              this host does not hold the expert, or is another incarnation
    |   |-- Busy                 a bounded queue is full
    |   |-- Expired              the deadline passed before the work was done
    |   |-- NoAnswer             a part of the cluster is too slow, or restarts
    |   |-- Ending               the service ends, and accepts no new requests
    |   |-- HostLost             a host's connection ended
    |   |   `-- HostGone         its process has ended
    |   |-- Corrupted            bytes changed on the way
    |   |-- Interrupted          an answer stopped and cannot continue
    |   |-- Overloaded           the endpoint's limit of requests, or of their bytes, is reached
    |   `-- SlowBody             the body of a request did not arrive in time
    |-- ExpertUnavailable        no replica of an expert answered before the deadline
    |-- BadExpert                an expert produced values that are not finite
    |-- StepLost                 a training step cannot be finished, and is to be done again
    |-- EngineError              the trunk's engine failed or was restarted
    |-- ClusterError             Ray, processes, ports: the pool could not be started or reached
    |   |-- Superseded           a newer controller has taken over
    |   |-- NoRun                no training run lives that could be gone on with
    |   `-- StateLost            what a training run keeps is lost, and it goes back to a checkpoint
    `-- InternalError            a defect of ours
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import PurePath
from typing import ClassVar


class MoesaicError(Exception):
    """Something failed.

    Base of every error that Moesaic raises on purpose. ``retryable`` says whether the same request
    may succeed when it is sent again; ``http_status`` is the endpoint's status for it. The first
    line of a class's docstring is the message of its errors that were given none.

    ``for_clients``: messages of the class are written for clients outside the cluster. Those of all
    other classes may name hosts, addresses, files and classes, and stay in the logs
    (`client_message`).
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
    """The given value cannot be used."""

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
    """The client may not do this."""

    for_clients = True
    http_status = 403


class Retryable(MoesaicError):
    """The call failed this time, and nothing is lost: send it again."""

    retryable = True
    http_status = 503


class NotHere(Retryable):
    """The host does not hold the expert, or is not the incarnation that the call names."""


class Busy(Retryable):
    """A bounded queue is full; send the request again later or elsewhere.

    After ``retry_after_s``, if that is known.
    """

    for_clients = True
    http_status = 429
    retry_after_s: float | None = None


class Expired(Retryable):
    """The deadline passed before the work was done; the work was dropped, not computed."""

    for_clients = True
    http_status = 504


class NoAnswer(Retryable):
    """A part of the cluster did not answer in time; ask again."""


class Ending(Retryable):
    """The service is ending; send the request again, elsewhere or later."""

    for_clients = True


class HostLost(Retryable):
    """The connection to a host ended with calls in flight."""


class HostGone(HostLost):
    """The process of a host has ended, and with it all that was only there."""


class Corrupted(Retryable):
    """A call or an answer was corrupted on the way: its checksum does not match."""

    for_clients = True


class Interrupted(Retryable):
    """An answer stopped and cannot continue: send the whole request again."""

    for_clients = True


class Overloaded(Retryable):
    """The endpoint's limit of requests, or of their bytes, is reached; try again later."""

    for_clients = True


class SlowBody(Retryable):
    """The body of a request did not arrive in time; send the request again."""

    http_status = 408
    for_clients = True


class ExpertUnavailable(MoesaicError):
    """No replica of an expert answered before the deadline.

    The message names the expert. If a router in this process raised the error, ``is_back`` returns
    whether another try is worthwhile now. It only reads; who waits for it does so inside of
    ``expecting()``, where the router looks for hosts by itself.
    """

    for_clients = True
    retryable = True
    http_status = 503
    is_back: Callable[[], bool] | None = None
    expecting: Callable[[], AbstractContextManager[None]] = nullcontext


class BadExpert(MoesaicError):
    """An expert's output has NaN or infinite values.

    The message names the expert.
    """

    for_clients = True


class StepLost(MoesaicError):
    """A training step cannot be finished. The pool has the weights of the last one: do it again."""


class EngineError(MoesaicError):
    """The trunk's engine failed; it is restarted, and the request may be sent again."""

    retryable = True
    http_status = 503


class ClusterError(MoesaicError):
    """The pool could not be started or reached."""


class Superseded(ClusterError):
    """A newer controller has taken over; the one that asked has to end."""


class NoRun(ClusterError):
    """No training run lives that another process could go on with."""


class StateLost(ClusterError):
    """What a training run keeps is lost with its hosts; the run goes on from a checkpoint alone."""


class InternalError(MoesaicError):
    """An internal error of Moesaic; its log says more.

    The message has the foreign error's text (`describe_error`).
    """


def _tree(cls: type[MoesaicError]) -> dict[str, type[MoesaicError]]:
    found = {cls.__name__: cls}
    for sub in cls.__subclasses__():
        found |= _tree(sub)
    return found


ERRORS: dict[str, type[MoesaicError]] = _tree(MoesaicError)


def _first_line(cls: type[MoesaicError]) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]


def client_message(error: MoesaicError, request_id: str = "") -> str:
    """Return the message for a client outside the cluster.

    It is the error's own message if that is written for clients. Otherwise it is the general
    message of the class, with the id under which the log has the error's own.
    """
    if error.for_clients:
        return str(error)
    general = _first_line(type(error))
    return f"{general} (request {request_id})" if request_id else general


def describe_error(error: BaseException) -> str:
    """Return the type and the message of any exception, like "KeyError: 'x'".

    For one without a message, like a TimeoutError or a bare assertion, it says where it was raised.
    """
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
    """Make the error that ``code`` names, or an InternalError that names the unknown code."""
    cls = ERRORS.get(code)
    return cls(message) if cls else InternalError(f"{code}: {message}")
