"""`apply`: a running cluster follows another spec."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .operate import JsonOption, err, out
from .terminal import bars, print_report, table

if TYPE_CHECKING:
    from ..cluster.reports.applying import ApplyReport

_SHOWN = 60


def register(app: typer.Typer) -> None:
    app.command()(apply)


def apply(
    spec: Annotated[Path, typer.Argument(help="The spec that the cluster is to follow.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what differs, and change nothing.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Restart parts of the cluster without asking.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Let the running cluster of the spec's name follow the spec."""
    from ..cluster.spec.spec import load_spec
    from ..handle import connect

    wanted = load_spec(spec)
    cluster = connect(wanted.name)
    with bars(err) as progress:
        planned = cluster.apply(wanted, dry_run=True, progress=progress, warn=_warn)
    if dry_run:
        print_report(planned) if as_json else _print(planned)
        return
    if not as_json:
        _print(planned)
    if planned.restarts and not yes:
        if as_json:
            raise typer.BadParameter(
                "parts have to restart, and the command cannot ask for consent; give --yes too",
                param_hint="--json",
            )
        typer.confirm("restart these parts?", abort=True)
    with bars(err) as progress:
        done = cluster.apply(wanted, restarts=True, progress=progress, warn=_warn)
    if as_json:
        print_report(done)
    elif planned.differences or planned.restarts:
        out.print(f"cluster {wanted.name} follows {spec}", soft_wrap=True)


def _print(report: ApplyReport) -> None:
    if not report.differences and not report.restarts:
        out.print(f"cluster {report.cluster} runs as the spec says")
        return
    shown = table("key", "now", "then")
    for one in report.differences:
        shown.add_row(one.path, _value(one.before), _value(one.after))
    if report.differences:
        out.print(shown)
    for part in report.restarts:
        out.print(f"restarts: {part}", markup=False)
    if not report.restarts:
        out.print("nothing has to restart for this")


def _value(text: str | None) -> str:
    if text is None:
        return "-"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _warn(text: str) -> None:
    err.print(text, markup=False, soft_wrap=True)
