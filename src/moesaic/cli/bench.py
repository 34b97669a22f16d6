"""`moesaic bench`."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from .chat import ModelOption, NameOption, UrlOption, url_of
from .progress import bars
from .terminal import print_json

if TYPE_CHECKING:
    from ..bench import LoadResult

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def register(app: typer.Typer) -> None:
    app.command()(bench)


def bench(
    name: NameOption = "local",
    url: UrlOption = None,
    model: ModelOption = None,
    concurrency: Annotated[
        str, typer.Option(help="Requests at the same time; one run for each number.")
    ] = "1,4,16",
    requests: Annotated[
        int | None, typer.Option(min=1, help="Requests per run (default: 4 x concurrency).")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 32,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of each answer.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the random prompts.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Plain JSON on stdout.")] = False,
) -> int:
    """Put a short load on an endpoint and show how long tokens take."""
    many = _numbers(concurrency)
    from ..bench import measure_load

    with bars(err) as progress:
        found = asyncio.run(
            measure_load(
                url_of(name, url),
                model=model,
                concurrency=many,
                requests=requests,
                prompt_tokens=prompt_tokens,
                answer_tokens=answer_tokens,
                seed=seed,
                progress=progress,
            )
        )
    if as_json:
        print_json([asdict(one) for one in found])
    else:
        _print(found)
    return 1 if any(sum(one.errors.values()) == one.requests for one in found) else 0


def _numbers(text: str) -> list[int]:
    try:
        found = [int(number) for number in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise typer.BadParameter(
            f"{text!r}: numbers above 0 are expected, like 1,4,16", param_hint="--concurrency"
        )
    return found


def _print(found: list[LoadResult]) -> None:
    table = Table("at a time", "requests", "failed", "tokens/s")
    for column in ("first token p50", "p99", "next token p50", "p99"):
        table.add_column(column, justify="right")
    for one in found:
        failed = ", ".join(f"{count} {code}" for code, count in one.errors.items())
        table.add_row(
            str(one.concurrency),
            str(one.requests),
            failed or "0",
            f"{one.answer_tokens_per_s:,.1f}",
            *map(
                _milliseconds,
                (
                    one.first_token_s.p50,
                    one.first_token_s.p99,
                    one.between_tokens_s.p50,
                    one.between_tokens_s.p99,
                ),
            ),
        )
    out.print(table)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:,.1f} ms"
