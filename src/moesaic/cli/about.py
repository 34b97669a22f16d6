"""`moesaic version`, `inspect` and `spec`: the commands that need no cluster."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import about
from ..actors.preflight.findings import Finding, errors_of, raise_errors, severity_counts
from ..models.trunk.lean_imports import import_models
from ..proto.errors import SpecError
from .terminal import print_json

if TYPE_CHECKING:
    from ..cluster.card_memory import PlannedCard
    from ..models.trunk.describe import ModelDescription

out = Console(highlight=False)

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]

spec_app = typer.Typer(help="Check a spec, or print all keys of specs.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.command("version")(show_version)
    app.command("inspect")(inspect_model)
    app.add_typer(spec_app, name="spec")


def _prepare_to_look() -> None:
    """Import what reads a model, in a process that ends afterwards."""
    gc.disable()  # imports make millions of objects and no garbage
    import_models()


def show_version(as_json: JsonOption = False) -> None:
    """Show the versions of Moesaic and of its main dependencies."""
    found = about.versions()
    if as_json:
        print_json(found)
        return
    for name, number in found.items():
        out.print(f"{name} {number}")


def inspect_model(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="The model: a folder, a Hugging Face hub id, or demo.")
    ],
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"],
        typer.Option(help="Data type in which hosts hold the experts."),
    ] = "bfloat16",
    memory: Annotated[str, typer.Option(help="Memory of one host, such as 16GB.")] = "16GB",
    replicas: Annotated[
        int, typer.Option(min=1, help="Number of replicas of each expert to assume.")
    ] = 1,
    as_json: JsonOption = False,
) -> None:
    """Show a model's experts, their sizes, and how many hosts the model needs."""
    from ..cluster.spec.text import bytes_of

    try:
        memory_bytes = bytes_of(memory)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--memory") from None
    if context.obj.ends_process:
        _prepare_to_look()
    checked = about.check_model(model, dtype)
    if checked.described is None:
        raise_errors(checked.findings)
    found = cast("ModelDescription", checked.described)
    try:
        hosts = found.hosts(memory_bytes, replicas)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--memory") from None
    if as_json:
        print_json(
            {
                **asdict(found),
                "hosts": hosts,
                "memory_bytes": memory_bytes,
                "findings": _plain(checked.findings),
            }
        )
        raise_errors(checked.findings)
        return
    table = Table(show_header=False, box=None)
    numbers = sorted(set(found.layers.values()))
    each = f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,}"
    rows = {
        "architecture": found.architecture,
        "checkpoint": found.quantised and f"{found.quantised}, held as {found.dtype}",
        "layers with experts": f"{len(found.layers)}, {each} experts each",
        "experts of a token": "?" if found.top_k is None else str(found.top_k),
        "one expert": f"{_size(found.expert_bytes)} in {found.dtype}",
        "all experts": _size(found.experts_bytes),
        "trunk": _size(found.trunk_bytes),
        f"hosts with {memory}": f"{hosts} for {replicas} "
        + ("replica" if replicas == 1 else "replicas") + " of each expert",
    }  # fmt: skip
    for name, words in rows.items():
        if words:
            table.add_row(name, words)
    out.print(table)
    _print_findings([one for one in checked.findings if one.severity != "error"])
    raise_errors(checked.findings)


@spec_app.command("check")
def check_spec(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="The spec, a YAML file.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole spec and the findings as JSON.")
    ] = False,
) -> None:
    """Check a spec and its models as far as possible, without starting the cluster."""
    from ..cluster.spec.spec import load_spec

    spec = load_spec(file)
    if context.obj.ends_process:
        _prepare_to_look()
    examined = about.examine_spec(spec)
    findings = examined.findings
    number = len(errors_of(findings))
    if as_json:
        cards = [_plain_card(card) for card in examined.cards]
        print_json({**spec.model_dump(mode="json"), "findings": _plain(findings), "cards": cards})
    else:
        _print_findings(findings)
        for card in examined.cards:
            out.print(str(card), markup=False)
        models = ", ".join(model.name for model in spec.models) or "no models"
        hosts = "host" if spec.num_hosts == 1 else "hosts"
        if not number:
            what = "is valid" if not findings else "can be started"
            rest = f" ({severity_counts(findings)})" if findings else ""
            out.print(
                f"{file} {what}{rest}: cluster {spec.name}, {spec.num_hosts} {hosts}, {models}"
            )
    if number:
        raise SpecError(f"{file}: cannot be started: {severity_counts(findings)}")


@spec_app.command("schema")
def print_schema() -> None:
    """Print the JSON schema of specs, which editors use to check a spec."""
    from ..cluster.spec.spec import Spec

    print_json(Spec.model_json_schema())


@spec_app.command("docs")
def print_page() -> None:
    """Print every key of a spec with its type, default, bounds and meaning, as Markdown."""
    from ..cluster.spec.page import spec_page

    sys.stdout.write(spec_page())


def _plain(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    return [asdict(finding) for finding in findings]


def _plain_card(card: PlannedCard) -> dict[str, Any]:
    return {
        "card": card.card.name,
        "memory_bytes": card.card.total_bytes,
        "free_bytes": card.card.free_bytes,
        "planned_bytes": card.planned_bytes,
        "processes": [
            {**asdict(process), "planned_bytes": process.planned_bytes}
            for process in card.processes
        ],
    }


def _print_findings(findings: Sequence[Finding]) -> None:
    """Print a line for each finding; a terminal gets a table, which wraps within its column."""
    if not out.is_terminal:
        for finding in findings:
            print(f"{finding.severity}: {finding}")
        return
    table = Table(show_header=False, box=None, padding=(0, 1, 0, 0))
    for finding in findings:
        table.add_row(finding.severity, escape(str(finding)))
    if findings:
        out.print(table)


def _size(value: int) -> str:
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if value >= 10**power:
            return f"{value / 10**power:,.1f} {unit}"
    return f"{value} bytes"
