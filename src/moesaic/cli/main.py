"""`moesaic`: the command line."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from ..actors.runtime.process_log import set_up_logging
from ..proto.errors import MoesaicError, describe_error
from . import about, apply, bench, chat, expert, operate, watch
from .ending import DONE, EPILOG, FAILED, INTERRUPTED, NOBODY_READS, USAGE, exit_with
from .live.train import train
from .simulate import simulate
from .terminal import print_json, print_report

app = typer.Typer(
    name="moesaic",
    help="Elastic expert parallelism on Ray for Mixture-of-Experts models.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
err = Console(stderr=True)

NameOption = Annotated[str, typer.Option("--name", help="Name of the cluster, as in its spec.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


@app.command()
def up(
    spec: Annotated[
        str | None,
        typer.Argument(
            help="A spec (a YAML file), or a model: a folder, a Hugging Face hub id, or demo. "
            "Default: deploy/local.yaml if the current folder has this file, else demo."
        ),
    ] = None,
    detach: Annotated[
        bool,
        typer.Option(
            "--detach", "-d", help="Return as soon as the cluster is ready; `down` ends it."
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the cluster's addresses as JSON once it is ready."),
    ] = False,
    only_print: Annotated[
        bool,
        typer.Option("--print-spec", help="Print the spec as YAML instead of starting a cluster."),
    ] = False,
) -> None:
    """Start a cluster, and run it until Ctrl-C."""
    from .run import print_spec, run, spec_of

    if only_print:
        print_spec(spec_of(spec))
    else:
        run(spec, detach=detach, as_json=as_json)


@app.command()
def down(
    name: NameOption = "local",
    drain: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Seconds that running requests have. Default: the spec's endpoint.drain_s.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """End a running cluster; running requests may finish first."""
    from ..connecting import running_cluster
    from ..handle import Cluster
    from ..session import find_session

    found = find_session(name)
    # What a start that was cut off has left is ended, too.
    cut_off = found is not None and not found.ready and not found.starts
    cluster = Cluster(found if cut_off and found is not None else running_cluster(name))
    name = cluster.name
    drain_s = cluster.drain_s if drain is None else drain
    with err.status(f"ending cluster {name}: running requests have {drain_s:g} s"):
        cluster.down(drain_s, told=lambda line: err.print(line, markup=False, soft_wrap=True))
    print_json({"name": name, "ended": True}) if as_json else err.print(f"cluster {name} is down")


@app.command()
def status(
    name: NameOption = "local",
    as_json: JsonOption = False,
) -> None:
    """Show the cluster's hosts, models, placement, and how many experts have one replica."""
    from .status import print_status, read_status

    document = read_status(name)
    print_report(document) if as_json else print_status(document)


@app.command()
def upcycle(
    dense: Annotated[
        str, typer.Argument(help="The dense model: a llama or mistral folder, or a GGUF file.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write the new model into.")],
    experts: Annotated[int, typer.Option(help="Number of experts in each layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Number of experts that compute each token.")] = 2,
    noise: Annotated[
        float,
        typer.Option(
            help="Noise that makes the experts differ, as a fraction of each weight matrix's "
            "standard deviation."
        ),
    ] = 0.05,
    gate: Annotated[
        str,
        typer.Option(
            help="Weights of the gates, which choose experts. random: random numbers. kmeans: "
            "cluster centres of the hidden states of the --text files."
        ),
    ] = "random",
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A text file for --gate kmeans; repeat the option for several files."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise and of the gates.")] = 0,
    dtype: Annotated[str, typer.Option(help="Data type of the weights on disk.")] = "float32",
    overwrite: Annotated[
        bool, typer.Option(help="Replace the folder OUT; all files in it are deleted.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a Mixture-of-Experts checkpoint of a dense one (sparse upcycling)."""
    from ..models.upcycling.upcycle import upcycle as make
    from .terminal import bars

    if gate not in ("random", "kmeans"):
        raise typer.BadParameter(f"{gate!r} is neither random nor kmeans", param_hint="--gate")
    chosen: Literal["random", "kmeans"] = "kmeans" if gate == "kmeans" else "random"
    corpora: dict[str, list[str | Path]] = {str(file): [file] for file in text or []}
    with bars(err) as progress:
        folder = make(
            dense,
            out,
            experts=experts,
            top_k=top_k,
            noise=noise,
            gate=chosen,
            texts=corpora or None,
            seed=seed,
            dtype=dtype,
            overwrite=overwrite,
            progress=progress,
        )
    print_json({"folder": str(folder)}) if as_json else err.print(f"wrote {folder}")


about.register(app)
chat.register(app)
bench.register(app)
operate.register(app)
apply.register(app)
expert.register(app)
watch.register(app)
app.command()(simulate)
app.command()(train)


@dataclass(frozen=True, slots=True)
class Caller:
    """What a command knows of the code that runs it."""

    ends_process: bool  # after the command, so that nothing else uses what it imports


def main(argv: list[str] | None = None, *, ends_process: bool = False) -> int:
    """Run a command; a user's mistake never shows a traceback."""
    try:
        result: Any = app(args=argv, standalone_mode=False, obj=Caller(ends_process))
        return result if isinstance(result, int) else DONE
    except MoesaicError as error:
        return _failed(error)
    except BrokenPipeError:
        # Python flushes stdout when it ends; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS
    except OSError as error:
        return _failed(error)
    except (typer.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except Exception as error:
        # Typer's own errors of usage can show themselves; all others are raised again.
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        return int(getattr(error, "exit_code", USAGE))


def _failed(error: Exception) -> int:
    # Not wrapped, so that programs and people can search for words in it.
    err.print(f"[red]error:[/red] {escape(_words(error))}", highlight=False, soft_wrap=True)
    return FAILED


def _words(error: Exception) -> str:
    text = str(error)
    return text if text.strip() else describe_error(error)


def run() -> None:
    """Run the command of this process, which then logs to stderr: warnings, by default."""
    try:
        set_up_logging("command", default=logging.WARNING)
    except MoesaicError as error:
        sys.exit(_failed(error))
    exit_with(main(ends_process=True))


if __name__ == "__main__":
    run()
