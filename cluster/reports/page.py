"""Write all reports, field by field, as Markdown: `make reports` makes docs/reports.md."""

from __future__ import annotations

from enum import Enum
from types import UnionType
from typing import Any, Union, get_args, get_origin

from .activity import Activity, ExpertReport
from .applying import ApplyReport
from .placing import ChangeReport, DrainReport, PlanReport
from .report import Report
from .scaling import ScalingReport
from .status import ClusterStatus, EndpointStatus, StatusDocument
from .training import TrainReport
from .updates import WeightUpdateReport

# Command -> the report that `--json` prints, and whether it prints a list of them.
COMMANDS: dict[str, tuple[type[Report], bool]] = {
    "status": (StatusDocument, False),
    "top": (Activity, False),
    "experts": (ExpertReport, True),
    "plan": (PlanReport, False),
    "rebalance": (ChangeReport, False),
    "replicate": (ChangeReport, False),
    "pin": (ChangeReport, False),
    "unpin": (ChangeReport, False),
    "undrain": (ChangeReport, False),
    "rollback": (ChangeReport, False),
    "history": (ChangeReport, True),
    "drain": (DrainReport, False),
    "scale": (ScalingReport, False),
    "apply": (ApplyReport, False),
    "train": (TrainReport, False),
    "expert put": (WeightUpdateReport, False),
    "expert revert": (WeightUpdateReport, False),
}
_HEAD = """\
# Reports

What operators see of a cluster has one form, in Python and in JSON: pydantic models with the names
below. `Cluster.top()` returns an `Activity`, and `moesaic top --json` prints the same as JSON.
`/status` and `Client.status()` give an `EndpointStatus`. This page is generated from the code by
`make reports`.

Names of fields stay: fields are added, and never renamed or removed. So leave out fields that you
do not know; states and phases may have new words, too. A block without a value is `null`, and
its key is there all the same. Units are in the names: `_s` are seconds, `_bytes` bytes, `_per_s`
rates, and a `fraction` or `share` is between 0 and 1. A replica is a copy of an expert on a host,
and an assignment is a token and one of its experts ([glossary](glossary.md)).
"""


def reports_page() -> str:
    """Return the whole page."""
    commands = ["| command with `--json` | prints |", "|---|---|"]
    for command, (report, many) in COMMANDS.items():
        commands.append(f"| `{command}` | {'list of ' if many else ''}{_link(report)} |")
    return "\n".join([_HEAD, *commands, "", *(_section(report) for report in all_reports())])


def all_reports() -> list[type[Report]]:
    """Return every report, each before its parts."""
    found: list[type[Report]] = []
    roots = [report for report, _ in COMMANDS.values()]
    for root in (ClusterStatus, EndpointStatus, *roots):
        _add(root, found)
    return found


def _add(report: type[Report], found: list[type[Report]]) -> None:
    if report in found:
        return
    found.append(report)
    for field in report.model_fields.values():
        for part in _reports_in(field.annotation):
            _add(part, found)


def _reports_in(annotation: Any) -> list[type[Report]]:
    if isinstance(annotation, type) and issubclass(annotation, Report):
        return [annotation]
    return [part for inner in get_args(annotation) for part in _reports_in(inner)]


def _section(report: type[Report]) -> str:
    words = " ".join((report.__doc__ or "").replace("``", "`").split())
    lines = [f"## {report.__name__}", "", words, "", "| field | type | meaning |", "|---|---|---|"]
    for name, field in report.model_fields.items():
        meaning = " ".join((field.description or "").replace("``", "`").split())
        lines.append(f"| `{name}` | {_type(field.annotation)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _type(annotation: Any) -> str:
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_type(one) for one in get_args(annotation))
    if get_origin(annotation) is list:
        return f"list of {_type(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return f"mapping to {_type(get_args(annotation)[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Report):
        return _link(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(f"`{one.value}`" for one in annotation)
    plain = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
    return plain[annotation]


def _link(report: type[Report]) -> str:
    return f"[{report.__name__}](#{report.__name__.lower()})"


if __name__ == "__main__":
    print(reports_page(), end="")
