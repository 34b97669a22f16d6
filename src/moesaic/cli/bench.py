"""`moesaic bench`."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .chat import NameOption, UrlOption, url_of
from .terminal import bars, number, print_json, table

if TYPE_CHECKING:
    from ..bench import LoadResult

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def register(app: typer.Typer) -> None:
    app.command()(bench)


def bench(
    name: NameOption = "local",
    url: UrlOption = None,
    model: Annotated[
        str | None,
        typer.Option(help="Name of the model. It may be left out if there is only one."),
    ] = None,
    concurrency: Annotated[
        str,
        typer.Option(help="Numbers of requests at the same time; each number gets its own run."),
    ] = "1,4,16",
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="Requests per run. Default: 4 x concurrency, at least 8."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Number of tokens per prompt.")] = 32,
    answer_tokens: Annotated[
        int, typer.Option(min=1, help="Largest number of tokens per answer.")
    ] = 32,
    seconds: Annotated[
        float, typer.Option(min=1.0, help="Time limit for all runs together, shared evenly.")
    ] = 30.0,
    seed: Annotated[int, typer.Option(help="Seed of the random prompts.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout.")
    ] = False,
) -> int:
    """Send test requests to an endpoint, and show times to the first and to each next token."""
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
                limit_s=seconds,
                progress=progress,
            )
        )
    if as_json:
        print_json([asdict(one) for one in found])
    else:
        _print(found, seconds)
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


def _print(found: list[LoadResult], limit_s: float) -> None:
    shown = table(
        "streams", ">requests", ">failed", ">tokens/s",
        ">first p50", ">first p99", ">next p50", ">next p99",
    )  # fmt: skip
    for one in found:
        times = (
            one.time_to_first_token_s.p50, one.time_to_first_token_s.p99,
            one.inter_token_latency_s.p50, one.inter_token_latency_s.p99,
        )  # fmt: skip
        shown.add_row(
            str(one.concurrency),
            str(one.requests),
            str(sum(one.errors.values())),
            number(one.answer_tokens_per_s),
            *map(_milliseconds, times),
        )
    out.print(shown)
    out.print("first and next token in ms; medians and 99 % quantiles")
    for one in found:
        for code, count in one.errors.items():
            out.print(f"[red]{one.concurrency} streams: {count} requests failed with {code}[/red]")
        if one.unfinished:
            out.print(
                f"[yellow]{one.concurrency} streams: {one.unfinished} of "
                f"{one.requests + one.unfinished} requests did not end within the limit of "
                f"{limit_s:g} s (--seconds)[/yellow]"
            )


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else number(1e3 * seconds)
