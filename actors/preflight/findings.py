"""What is found before a cluster is started, and how it is told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ...proto.errors import ClusterError, MoesaicError, from_wire

# error: it cannot start, or not serve. warning: it does, and something is odd. unchecked: it could
# not be looked at from here, and shows later.
Severity = Literal["error", "warning", "unchecked"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "unchecked")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong with a spec, or odd, or could not be checked."""

    severity: Severity
    path: str  # the spec's key, as models.0.path
    message: str  # one sentence: what is wrong, and what to do
    code: str = ClusterError.__name__  # of an error: its class in proto.errors

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


def finding_of(error: MoesaicError, path: str) -> Finding:
    """An error that was raised while ``path`` was checked."""
    # Errors name the key themselves: the whole, or its last part.
    message = " ".join(str(error).split()).removeprefix(f"{path}: ")
    message = message.removeprefix(f"{path.rpartition('.')[2]}: ")
    return Finding(severity="error", path=path, message=message, code=error.code)


def errors_of(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity == "error"]


def raise_errors(findings: Sequence[Finding]) -> None:
    """Raises one error with all of those in ``findings``: of their class, where they have the same
    one, else ClusterError."""
    found = errors_of(findings)
    if not found:
        return
    codes = {finding.code for finding in found}
    code = codes.pop() if len(codes) == 1 else ClusterError.__name__
    lines = [str(finding) for finding in found]
    if len(lines) > 1:
        lines = [f"{len(lines)} things keep the cluster from starting:", *lines]
    raise from_wire(code, "\n  ".join(lines))


def said(findings: Iterable[Finding]) -> str:
    """How many of each kind, as "1 error, 2 warnings, 1 unchecked"; "no problem" of none."""
    numbers = dict.fromkeys(SEVERITIES, 0)
    for finding in findings:
        numbers[finding.severity] += 1
    words = [
        f"{number} {severity}" + ("s" if number > 1 and severity != "unchecked" else "")
        for severity, number in numbers.items()
        if number
    ]
    return ", ".join(words) or "no problem"
