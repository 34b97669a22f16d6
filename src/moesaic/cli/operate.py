"""The commands that look at placements and change them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ..handle import Cluster, connect
from ..proto.errors import ClusterError
from .live.top import frame
from .terminal import print_report, table

if TYPE_CHECKING:
    from ..cluster.reports.placing import ChangeReport, DrainReport, MeasuredEffect, PlanReport
    from ..cluster.reports.report import Balancedness
    from ..cluster.reports.scaling import ScalingReport

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

NameOption = Annotated[str, typer.Option("--name", help="Name of the cluster, as in its spec.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        help="Largest number of replicas to load for balance, or of bytes, such as 4GB. "
        "Default: the spec's balance.budget."
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(help="Name of the model; needed if the cluster serves several."),
]
LayerArgument = Annotated[
    int, typer.Argument(help="Number of the layer in the model, from 0.", min=0)
]
ExpertArgument = Annotated[
    int, typer.Argument(help="Number of the expert in the layer, from 0.", min=0)
]
TimeoutOption = Annotated[
    float,
    typer.Option(
        help="Seconds to wait for the operation's end, before the command fails. The cluster goes "
        "on with the operation."
    ),
]
HostArgument = Annotated[str, typer.Argument(help="Name of the host, as in `moesaic status`.")]


def register(app: typer.Typer) -> None:
    for command in (
        plan,
        rebalance,
        rollback,
        history,
        replicate,
        pin,
        unpin,
        drain,
        undrain,
        scale,
    ):
        app.command()(command)


def plan(
    name: NameOption = "local", budget: BudgetOption = None, as_json: JsonOption = False
) -> None:
    """Show what a rebalance would move and why, its bytes, its seconds, and its effect."""
    found = connect(name).plan(budget=_budget(budget))
    print_report(found) if as_json else _print_plan(found)


def rebalance(
    name: NameOption = "local",
    budget: BudgetOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Start without asking.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show what `moesaic top` shows during the rebalance.")
    ] = False,
    timeout: TimeoutOption = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Move replicas of experts so that the load of hosts is even, and wait for the end."""
    if as_json and not yes:
        raise typer.BadParameter(
            "the command cannot ask for consent; give --yes too", param_hint="--json"
        )
    cluster = connect(name)
    if not yes:
        found = cluster.plan(budget=_budget(budget))
        _print_plan(found)
        if not found.moves:
            return
        typer.confirm("carry out these moves?", abort=True)
    change = cluster.rebalance(budget=_budget(budget))
    _carry_out(cluster, change, timeout, as_json, watch=watch)


def rollback(
    change: Annotated[
        int | None,
        typer.Argument(help="Id of the change, as in `history`. Default: the last change."),
    ] = None,
    name: NameOption = "local",
    as_json: JsonOption = False,
) -> None:
    """Undo a change: return to the placement of experts before the change."""
    done = connect(name).rollback(change)
    print_report(done) if as_json else _print_changes([done])


def history(name: NameOption = "local", as_json: JsonOption = False) -> None:
    """Show the last changes of the placement: who, why, predicted and measured effect, end."""
    found = connect(name).history()
    print_report(found) if as_json else _print_changes(found)


def replicate(
    layer: LayerArgument,
    expert: ExpertArgument,
    replicas: Annotated[
        int, typer.Option("--replicas", "-n", min=1, help="Smallest number of replicas.")
    ],
    model: ModelOption = None,
    name: NameOption = "local",
    timeout: TimeoutOption = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Set the smallest number of replicas of an expert; 1 removes this minimum."""
    cluster = connect(name)
    change = cluster.replicate(model_of(cluster, model), layer, expert, replicas)
    _carry_out(cluster, change, timeout, as_json)


def pin(
    layer: LayerArgument,
    expert: ExpertArgument,
    host: HostArgument,
    model: ModelOption = None,
    name: NameOption = "local",
    timeout: TimeoutOption = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Place a replica of an expert on a host, and keep it there until `unpin`."""
    cluster = connect(name)
    change = cluster.pin(model_of(cluster, model), layer, expert, host)
    _carry_out(cluster, change, timeout, as_json)


def unpin(
    layer: LayerArgument,
    expert: ExpertArgument,
    host: HostArgument,
    model: ModelOption = None,
    name: NameOption = "local",
    timeout: TimeoutOption = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Undo `pin`: the replica of the expert may leave the host."""
    cluster = connect(name)
    change = cluster.unpin(model_of(cluster, model), layer, expert, host)
    _carry_out(cluster, change, timeout, as_json)


def drain(
    host: HostArgument,
    name: NameOption = "local",
    timeout: TimeoutOption = 300.0,
    as_json: JsonOption = False,
) -> None:
    """Move all experts off a host while requests go on; `undrain` undoes the drain."""
    cluster = connect(name)
    with err.status(f"moving experts off {host}") as line:
        done = cluster.drain(
            host, timeout, watch=lambda seen: line.update(f"moving experts off {_left(seen)}")
        )
    if as_json:
        print_report(done)
    if done.remaining_replicas:
        why = done.obstacle or f"not done after {timeout:g} s"
        raise ClusterError(
            f"{_left(done)}: {why}; the cluster goes on with the drain: `moesaic status` shows "
            f"its progress, and `moesaic undrain {host}` undoes it"
        )
    if not as_json:
        err.print(f"{host} holds no experts any more")


def undrain(
    host: HostArgument,
    name: NameOption = "local",
    timeout: TimeoutOption = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Undo `drain`: the host may hold experts again."""
    cluster = connect(name)
    _carry_out(cluster, cluster.undrain(host), timeout, as_json)


def scale(
    hosts: Annotated[int, typer.Argument(help="New number of hosts in the group.", min=1)],
    group: Annotated[
        int, typer.Option(min=0, help="Index of the group in the spec's `hosts`, from 0.")
    ] = 0,
    name: NameOption = "local",
    timeout: TimeoutOption = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Set the number of hosts of a group and wait; hosts are drained before they end."""
    cluster = connect(name)
    with err.status(f"scaling group {group} to {hosts} hosts") as line:
        done = cluster.scale(
            hosts, group, timeout_s=timeout, watch=lambda seen: line.update(_scaling_words(seen))
        )
    print_report(done) if as_json else out.print(_scaling_words(done))


def _budget(text: str | None) -> int | str | None:
    """Return a number of replicas as an int, bytes as they are."""
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    from ..cluster.spec.text import bytes_of

    try:
        bytes_of(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--budget") from error
    return text


# ---- what is printed -----------------------------------------------------------------------------


def model_of(cluster: Cluster, model: str | None) -> str:
    if model is not None:
        return model
    served = [model.name for model in cluster.status().models]
    if len(served) != 1:
        several = f"the cluster serves several models; name one of {', '.join(served)}"
        raise ClusterError(f"--model: {several if served else 'the cluster serves no model'}")
    return served[0]


def _carry_out(
    cluster: Cluster,
    change: ChangeReport,
    timeout_s: float,
    as_json: bool,
    *,
    watch: bool = False,
) -> None:
    """Show a bar until a change has ended, and then how; ``watch`` also shows what `top` does."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    bars = Progress(*columns, console=err)
    bar = bars.add_task("loading replicas", total=change.total_moves)
    with Live(bars, console=err, transient=True) as live:

        def show(seen: ChangeReport) -> None:
            bars.update(bar, completed=max(0, change.total_moves - seen.pending_moves))
            if watch:
                live.update(Group(bars, frame(cluster.name, cluster.top(10))))

        done = cluster.wait_for(change, timeout_s, watch=show)
    print_report(done) if as_json else _print_changes([done])
    if done.phase == "failed":
        raise typer.Exit(1)


def _left(drain: DrainReport) -> str:
    return f"{drain.host}: {drain.remaining_replicas} experts are still there"


def _scaling_words(seen: ScalingReport) -> str:
    words = [
        f"group {seen.group}: {seen.hosts_before} -> {seen.target_hosts} hosts, {seen.phase.words}"
    ]
    if seen.arriving_hosts:
        words.append(f"arriving: {', '.join(seen.arriving_hosts)}")
    if seen.leaving_hosts:
        words.append(
            f"leaving: {', '.join(seen.leaving_hosts)}, with {seen.remaining_replicas} experts"
        )
    words += [f"{host} {why}" for host, why in seen.obstacles.items()]
    if seen.duration_s is not None:
        words.append(f"after {seen.duration_s:g} s")
    return "; ".join(words)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.1f} MiB"


def _print_plan(found: PlanReport) -> None:
    before, after = found.balancedness_before, found.balancedness_after
    if before is None or after is None:
        out.print("the cluster serves no model")
        return
    if found.moves:
        moves = table("expert", "to", "replaces", ">size", "why")
        for move in found.moves:
            moves.add_row(
                f"{move.model} layer {move.layer} expert {move.expert}",
                move.host,
                ", ".join(expert.words for expert in move.replaces),
                _mib(move.weight_bytes),
                f"{move.kind.words}: {move.reason}",
            )
        out.print(moves)
    else:
        out.print("nothing to move")
    out.print(
        f"{len(found.moves)} moves, {_mib(found.weight_bytes)}, about {found.expected_s:g} s; "
        f"{len(found.drops)} replicas leave"
    )
    out.print(
        f"balancedness: mean {before.mean:.3f} -> {after.mean:.3f}, "
        f"worst layer {before.worst:.3f} -> {after.worst:.3f}"
    )
    out.print(
        f"experts lost if one failure domain is lost: {found.unprotected_experts_before} -> "
        f"{found.unprotected_experts_after}"
    )
    if found.upkeep is not None:
        costs = found.upkeep
        out.print(
            f"{costs.model} is trained: a replica more costs {_mib(costs.replica_bytes)} and "
            f"{1e3 * costs.replica_s:.3g} ms in each step of {costs.step_s:.3g} s",
            markup=False,
        )
    if found.unplaced_experts:
        out.print(f"[red]no host has room for {len(found.unplaced_experts)} experts[/red]")


def _mean(balancedness: Balancedness | None) -> str:
    return "no load" if balancedness is None else f"{balancedness.mean:g}"


def _measured(effect: MeasuredEffect | None) -> str:
    """Return the balancedness after a change: for the placement without it, and with it."""
    if effect is None:
        return ""
    return (
        f"\nmeasured: {_mean(effect.balancedness_unchanged)} -> "
        f"{_mean(effect.balancedness_changed)}"
    )


def _print_changes(changes: list[ChangeReport]) -> None:
    if not changes:
        out.print("no changes yet")
        return
    shown = table(">id", "<who", "why", "phase", ">moves", ">size", ">took", "balance")
    for change in changes:
        took_s = change.duration_s
        shown.add_row(
            str(change.id),
            change.initiator,
            change.reason,
            change.phase.words + "".join(f"\n{error}" for error in change.errors),
            str(change.total_moves),
            _mib(change.weight_bytes),
            f"{took_s:g} s" if took_s is not None else f"{change.age_s:g} s so far",
            f"{_mean(change.balancedness_before)} -> {_mean(change.balancedness_predicted)}"
            + _measured(change.measured),
        )
    out.print(shown)
