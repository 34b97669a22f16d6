"""`moesaic version`, `inspect` and `spec`: what needs no cluster."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from ..about import inspect_model as describe_model
from ..about import versions
from ..cluster.spec import Spec, load_spec
from ..cluster.spec_page import spec_page
from ..cluster.spec_text import bytes_of
from .output import print_json

out = Console(highlight=False)

JsonOption = Annotated[bool, typer.Option("--json", help="Plain JSON on stdout.")]

spec_app = typer.Typer(help="Check a spec, or print what a spec can say.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.command("version")(show_version)
    app.command("inspect")(inspect_model)
    app.add_typer(spec_app, name="spec")


def show_version(as_json: JsonOption = False) -> None:
    """Show the versions of Moesaic and of what it runs on."""
    found = versions()
    if as_json:
        print_json(found)
        return
    for name, number in found.items():
        out.print(f"{name} {number}")


def inspect_model(
    model: Annotated[str, typer.Argument(help="A folder, a hub id, or demo.")],
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="Of the pool.")
    ] = "bfloat16",
    memory: Annotated[str, typer.Option(help="Of one host, as 16GB.")] = "16GB",
    replicas: Annotated[int, typer.Option(min=1, help="Of each expert.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Show a model's experts, their sizes, and how many hosts they need."""
    try:
        memory_bytes = bytes_of(memory)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--memory") from None
    found = describe_model(model, dtype)
    try:
        hosts = found.hosts(memory_bytes, replicas)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--memory") from None
    if as_json:
        print_json({**asdict(found), "hosts": hosts, "memory_bytes": memory_bytes})
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


@spec_app.command("check")
def check_spec(
    file: Annotated[Path, typer.Argument(help="A YAML file.")],
    as_json: Annotated[bool, typer.Option("--json", help="The whole spec, as JSON.")] = False,
) -> None:
    """Read a spec as `up` would, with overrides from the environment, and start nothing."""
    spec = load_spec(file)
    if as_json:
        print_json(spec.model_dump(mode="json"))
        return
    models = ", ".join(model.name for model in spec.models) or "no models"
    hosts = "host" if spec.num_hosts == 1 else "hosts"
    out.print(f"{file} is a good spec: cluster {spec.name}, {spec.num_hosts} {hosts}, {models}")


@spec_app.command("schema")
def print_schema() -> None:
    """Print the JSON schema of specs, for editors."""
    print_json(Spec.model_json_schema())


@spec_app.command("docs")
def print_page() -> None:
    """Print every key of a spec with its type, default, bounds and meaning, as Markdown."""
    sys.stdout.write(spec_page())


def _size(value: int) -> str:
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if value >= 10**power:
            return f"{value / 10**power:,.1f} {unit}"
    return f"{value} bytes"
