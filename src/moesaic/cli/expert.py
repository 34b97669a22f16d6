"""The commands that read and replace the weights of experts of a running cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..handle import connect
from ..private_files import replace_file
from ..proto.errors import CheckpointError
from .operate import ExpertArgument, JsonOption, LayerArgument, ModelOption, NameOption, model_of
from .terminal import print_json, print_report

if TYPE_CHECKING:
    from torch import Tensor

    from ..cluster.reports.updates import WeightUpdateReport

err = Console(stderr=True, highlight=False)

TimeoutOption = Annotated[
    float,
    typer.Option(
        help="Seconds until all hosts must have the weights. Hosts that do not have them then are "
        "not used for these experts.",
        min=1.0,
    ),
]


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        name="expert",
        help="Read or replace the weights of experts of a running cluster.",
        no_args_is_help=True,
    )
    for command in (put, get, revert):
        group.command()(command)
    app.add_typer(group)


def put(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Safetensors files with all tensors of the experts to update, named as in the "
            "model's checkpoint. `moesaic expert get` writes such a file."
        ),
    ],
    model: ModelOption = None,
    name: NameOption = "local",
    timeout: TimeoutOption = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Give experts new weights, all at once, while requests go on; `expert revert` undoes it."""
    tensors = _read(files)
    cluster = connect(name)
    with err.status("sending weights"):
        done = cluster.update_expert(model_of(cluster, model), tensors, timeout_s=timeout)
    _print(done, as_json)


def get(
    layer: LayerArgument,
    expert: ExpertArgument,
    file: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    model: ModelOption = None,
    name: NameOption = "local",
    as_json: JsonOption = False,
) -> None:
    """Write the weights of an expert that are in use to a file, named as in the checkpoint."""
    from safetensors.torch import save

    cluster = connect(name)
    tensors = cluster.get_expert(model_of(cluster, model), layer, expert)
    replace_file(file, save(tensors))
    if as_json:
        shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
        print_json({"file": str(file), "tensors": shapes})
    else:
        err.print(f"wrote {file}: {', '.join(tensors)}", markup=False)


def revert(
    model: ModelOption = None,
    name: NameOption = "local",
    timeout: TimeoutOption = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Undo the last update of a model's experts; repeat it to undo the one before."""
    cluster = connect(name)
    with err.status("going back to the weights before"):
        done = cluster.revert_expert(model_of(cluster, model), timeout_s=timeout)
    _print(done, as_json)


def _read(files: list[Path]) -> dict[str, Tensor]:
    from ..models.folder.files import open_weights

    found: dict[str, Tensor] = {}
    for file in files:
        with open_weights(file) as opened:
            for key in opened.keys():  # noqa: SIM118
                if key in found:
                    raise CheckpointError(f"{file}: {key} is in a file before this one, too")
                found[key] = opened.get_tensor(key)
    if not found:
        raise CheckpointError(f"{files[0]}: there are no tensors in it")
    return found


def _print(done: WeightUpdateReport, as_json: bool) -> None:
    if as_json:
        print_report(done)
        return
    what = f"update {done.number} of {done.model}"
    if done.reverts is not None:
        what += f" takes back update {done.reverts}"
    err.print(f"{what}: {done.experts} experts have other weights now")
    if done.volatile:
        err.print(
            f"[yellow]only hosts have these weights: set `updates` for {done.model} in the spec "
            "to keep such weights when the cluster ends[/yellow]"
        )
