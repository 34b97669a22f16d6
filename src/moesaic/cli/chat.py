"""`moesaic chat` and `moesaic complete`."""

from __future__ import annotations

import contextlib
import sys
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..connecting import running_cluster
from ..proto.errors import ClusterError, MoesaicError
from .terminal import print_json

if TYPE_CHECKING:
    from ..clients.http_client import Chunk, Client, Options

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

NameOption = Annotated[str, typer.Option("--name", help="Name of the cluster, as in its spec.")]
UrlOption = Annotated[str | None, typer.Option(help="URL of an endpoint, instead of --name.")]
ModelOption = Annotated[
    str | None,
    typer.Option(help="Name of the model. Default: the endpoint's first model."),
]
TemperatureOption = Annotated[
    float,
    typer.Option(min=0.0, max=2.0, help="Temperature of sampling; 0: the likeliest token."),
]
TokensOption = Annotated[int, typer.Option(min=1, help="Largest number of tokens of an answer.")]
SeedOption = Annotated[
    int | None,
    typer.Option(help="Seed of sampling: the same seed gives the same text. Default: random."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the answer as JSON when it is complete.")
]

BLOCK = '"""'
HELP = f"""\
/system TEXT  set the system prompt; without a text, remove it
/reset        start a new conversation; the system prompt stays
/help         print this help
/exit         end, like Ctrl-D
A line that ends with \\ continues in the next one; {BLOCK} begins and ends a text of many lines.
Ctrl-C stops an answer, or drops the line being typed."""


def register(app: typer.Typer) -> None:
    for command in (chat, complete):
        app.command()(command)


def chat(
    message: Annotated[
        list[str] | None, typer.Argument(help="One message. Default: a conversation.")
    ] = None,
    name: NameOption = "local",
    url: UrlOption = None,
    model: ModelOption = None,
    system: Annotated[str | None, typer.Option(help="The system prompt. Default: none.")] = None,
    max_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Chat with a model; each answer appears while the model generates the answer."""
    if as_json and not message:
        raise typer.BadParameter("--json needs a message as argument", param_hint="--json")
    options: Options = {"max_tokens": max_tokens, "temperature": temperature}
    if seed is not None:
        options["seed"] = seed
    url = url_of(name, url)
    from ..clients.http_client import Client

    with Client(url) as client:
        options["model"] = model or _first_model(client)
        talk = Conversation(client, options, system)
        if message and as_json:
            asked = [*talk.messages, {"role": "user", "content": " ".join(message)}]
            print_json(asdict(client.chat(asked, **options)))
        elif message:
            talk.say(" ".join(message))
        else:
            if sys.stdin.isatty():
                err.print(f"[dim]{options['model']} at {url}; /help lists the commands[/dim]")
            converse(talk)


def complete(
    prompt: Annotated[list[str], typer.Argument(help="The text that the model continues.")],
    name: NameOption = "local",
    url: UrlOption = None,
    model: ModelOption = None,
    max_tokens: TokensOption = 64,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a model continue a text; the new text appears while the model generates it."""
    options: Options = {"max_tokens": max_tokens, "temperature": temperature}
    if seed is not None:
        options["seed"] = seed
    text = " ".join(prompt)
    from ..clients.http_client import Client

    with Client(url_of(name, url)) as client:
        options["model"] = model or _first_model(client)
        if as_json:
            print_json(asdict(client.complete(text, **options)))
            return
        for chunk in client.stream_complete(text, **options):
            _show(chunk)
        out.print()


class Conversation:
    """The messages so far, and the options of the next answer."""

    def __init__(self, client: Client, options: Options, system: str | None) -> None:
        self._client = client
        self._options = options
        self.messages: list[dict[str, str]] = []
        self.instruct(system or "")

    def instruct(self, system: str) -> None:
        """Replace the system prompt; an empty one removes it."""
        said = [one for one in self.messages if one["role"] != "system"]
        self.messages = [{"role": "system", "content": system}, *said] if system else said

    def reset(self) -> None:
        self.messages = [one for one in self.messages if one["role"] == "system"]

    def say(self, text: str) -> None:
        """Send a message and print the answer while it is generated.

        An exchange that failed, or was stopped before its first word, is not kept. Raises
        MoesaicError and KeyboardInterrupt.
        """
        asked = {"role": "user", "content": text}
        pieces: list[str] = []
        try:
            chunks = self._client.stream_chat([*self.messages, asked], **self._options)
            # When the answer is stopped, closing the stream at once ends the request.
            with closing(chunks):  # pyright: ignore[reportArgumentType]  (it is a generator)
                for chunk in chunks:
                    pieces.append(chunk.text)
                    _show(chunk)
        except KeyboardInterrupt:
            self._keep(asked, pieces)
            raise
        self._keep(asked, pieces)
        out.print()

    def _keep(self, asked: dict[str, str], pieces: list[str]) -> None:
        if text := "".join(pieces):
            self.messages += [asked, {"role": "assistant", "content": text}]


def converse(talk: Conversation) -> None:
    """Read messages and answer them until /exit or the end of the input.

    Without a terminal a failed answer ends the conversation and raises MoesaicError, because
    nobody is there to ask again.
    """
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  (gives input() line editing and history)
    while True:
        try:
            text = _read()
            if text.startswith("/") and "\n" not in text:
                if not _command(talk, text):
                    return
            elif text.strip():
                talk.say(text)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            err.print("\n[dim](stopped; /exit or Ctrl-D ends)[/dim]")
        except MoesaicError as error:
            if not sys.stdin.isatty():
                raise
            err.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)


def _command(talk: Conversation, text: str) -> bool:
    """Carry out a command; return whether the conversation goes on."""
    command, _, rest = text.strip().partition(" ")
    match command:
        case "/exit" | "/quit":
            return False
        case "/system":
            talk.instruct(rest.strip())
        case "/reset":
            talk.reset()
        case "/help":
            err.print(HELP, markup=False)
        case _:
            err.print(f"there is no command {command}; /help lists the commands", markup=False)
    return True


def _read() -> str:
    """Read one message, which may have many lines. Raises EOFError at the end of the input."""
    line = _line("you> ")
    if line.strip() == BLOCK:
        lines: list[str] = []
        while (line := _line("...> ")).strip() != BLOCK:
            lines.append(line)
        return "\n".join(lines)
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\")
        lines.append(_line("...> "))
    return "\n".join(lines)


def _line(prompt: str) -> str:
    if not sys.stdin.isatty():
        return input()
    if sys.stdout.isatty():
        return input(prompt)
    # Answers go into a file; the prompt must not.
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return input()


def _show(chunk: Chunk) -> None:
    out.print(chunk.text, end="", markup=False, soft_wrap=True)


def url_of(name: str, url: str | None) -> str:
    """Return ``url``, or the URL of the cluster ``name``. Raises ClusterError."""
    found = url or running_cluster(name).url
    if found is None:
        raise ClusterError(
            f"cluster {name!r} has no endpoint; add `endpoint` to its spec, or give --url"
        )
    return found


def _first_model(client: Client) -> str:
    models = client.models()
    if not models:
        raise ClusterError(
            "the endpoint serves no model; add one to `models` in the cluster's spec"
        )
    return models[0].id
