"""`moesaic chat` and `moesaic complete`."""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console
from rich.prompt import Prompt

from ..client import Client, Options
from ..proto.errors import ClusterError, MoesaicError
from ..session import need_session
from .output import print_json

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def converse(
    message: str | None,
    *,
    name: str,
    url: str | None,
    model: str | None,
    max_tokens: int,
    temperature: float,
) -> None:
    """Send one message, or go on until an empty line or the end of input."""
    url = url or _url_of(name)
    with Client(url) as client:
        chosen = model or _first_model(client)
        history: list[dict[str, str]] = []

        def answer(text: str) -> None:
            history.append({"role": "user", "content": text})
            said = []
            for chunk in client.stream_chat(
                history, model=chosen, max_tokens=max_tokens, temperature=temperature
            ):
                said.append(chunk.text)
                out.print(chunk.text, end="", markup=False, soft_wrap=True)
            out.print()
            history.append({"role": "assistant", "content": "".join(said)})

        if message is not None:
            answer(message)
            return
        err.print(f"[dim]{chosen} at {url}; an empty line ends the conversation[/dim]")
        while text := _ask():
            try:
                answer(text)
            except MoesaicError as error:
                history.pop()
                err.print(f"[red]error:[/red] {error}")


def go_on(
    prompt: str,
    *,
    name: str,
    url: str | None,
    model: str | None,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    as_json: bool,
) -> None:
    """One completion."""
    options: Options = {"max_tokens": max_tokens, "temperature": temperature}
    if seed is not None:
        options["seed"] = seed
    with Client(url or _url_of(name)) as client:
        options["model"] = model or _first_model(client)
        if as_json:
            print_json(asdict(client.complete(prompt, **options)))
            return
        for chunk in client.stream_complete(prompt, **options):
            out.print(chunk.text, end="", markup=False, soft_wrap=True)
        out.print()


def _url_of(name: str) -> str:
    url = need_session(name).url
    if url is None:
        raise ClusterError(f"cluster {name!r} has no endpoint in its spec")
    return url


def _first_model(client: Client) -> str:
    models = client.models()
    if not models:
        raise ClusterError("the endpoint serves no model")
    return models[0].id


def _ask() -> str:
    try:
        return Prompt.ask("[bold]you[/bold]", console=err).strip()
    except EOFError:
        return ""
