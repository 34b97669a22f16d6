"""Findings of the checks before a cluster starts, and how they are reported."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ...proto.errors import ClusterError, MoesaicError, from_wire

# error: the cluster cannot start or serve. warning: it can, but something is odd. unchecked: this
# cannot be checked from here, and shows later.
Severity = Literal["error", "warning", "unchecked"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "unchecked")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong with a spec, or odd, or could not be checked."""

    severity: Severity
    path: str  # the spec's key, for example models.0.path
    message: str  # one sentence: what is wrong, and what to do
    code: str = ClusterError.__name__  # for errors: the class in proto.errors

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


def finding_of(error: MoesaicError, path: str) -> Finding:
    """Return the finding for an error that was raised while ``path`` was checked."""
    # An error may begin with the key itself, or with its last part.
    message = " ".join(str(error).split()).removeprefix(f"{path}: ")
    message = message.removeprefix(f"{path.rpartition('.')[2]}: ")
    return Finding(severity="error", path=path, message=message, code=error.code)


def errors_of(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity == "error"]


def raise_errors(findings: Sequence[Finding]) -> None:
    """Raise one error that lists all errors in ``findings``, if there are any.

    It has their class if they all have the same, else it is a ClusterError.
    """
    found = errors_of(findings)
    if not found:
        return
    codes = {finding.code for finding in found}
    code = codes.pop() if len(codes) == 1 else ClusterError.__name__
    lines = [str(finding) for finding in found]
    if len(lines) > 1:
        lines = [f"{len(lines)} things keep the cluster from starting:", *lines]
    raise from_wire(code, "\n  ".join(lines))


def severity_counts(findings: Iterable[Finding]) -> str:
    """Return the number of each kind, as "1 error, 2 warnings, 1 unchecked", or "no problem"."""
    numbers = dict.fromkeys(SEVERITIES, 0)
    for finding in findings:
        numbers[finding.severity] += 1
    words = [
        f"{number} {severity}" + ("s" if number > 1 and severity != "unchecked" else "")
        for severity, number in numbers.items()
        if number
    ]
    return ", ".join(words) or "no problem"
