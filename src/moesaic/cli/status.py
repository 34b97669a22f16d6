"""`moesaic status`."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from ..cluster.reports.report import HostState, worst_routing
from ..cluster.reports.status import (
    CardStatus,
    ClusterStatus,
    EngineStatus,
    HostProcess,
    HostStatus,
    NodeStatus,
    RouterServiceStatus,
    RouterStatus,
    StatusDocument,
    TrainingStatus,
)
from ..connecting import running_cluster
from ..handle import connect
from .live.top import training_lines
from .terminal import table

out = Console(highlight=False)


def read_status(name: str) -> StatusDocument:
    """Read the cluster's status.

    Over HTTP if it has a monitoring address, which is faster and also has the engines' figures.
    """
    session = running_cluster(name)
    if session.monitoring is None:
        cluster, healthy, engines = connect(name).status(), None, None
    else:
        from ..clients.http_client import Client

        with Client(session.monitoring) as client:
            found = client.status()
        cluster, healthy, engines = found.cluster, found.healthy, found.engines
    return StatusDocument(
        name=session.name,
        url=session.url,
        monitoring_url=session.monitoring,
        healthy=healthy,
        engines=engines,
        cluster=cluster,
    )


def print_status(document: StatusDocument) -> None:
    out.print(f"cluster [bold]{document.name}[/bold]  {document.url or '(no endpoint)'}")
    if document.monitoring_url:
        out.print(f"monitoring: {document.monitoring_url} (the page), /status, /metrics")
    cluster = document.cluster
    if cluster is None:
        return
    if cluster.placement:
        out.print(f"placement: term {cluster.placement.term}, epoch {cluster.placement.epoch}")
    if cluster.router_service:
        _print_router_service(cluster.router_service)
    _print_hosts(cluster.hosts)
    for node in cluster.nodes:
        _print_node(node)
    for card in cluster.cards:
        _print_card(card)
    for router in cluster.routers:
        _print_paths(router)
    _print_models(cluster, document.engines or {})
    if cluster.training:
        _print_training(cluster.training)
    _print_balance(cluster)
    _print_size(cluster)
    if cluster.unprotected_experts:
        out.print(
            f"[yellow]{cluster.unprotected_experts} experts are in a single failure domain: if it "
            "is lost, requests for them wait[/yellow]"
        )
    for missing in cluster.missing_examples:
        out.print(f"[red]missing[/red] {missing.words}: {missing.reason}")
    if cluster.controller.error:
        out.print(f"[red]controller:[/red] {cluster.controller.error}")


def _print_paths(router: RouterStatus) -> None:
    """Say how a router reaches its hosts, those together that it reaches in the same way."""
    hosts: dict[str, list[str]] = {}
    for path in router.paths:
        sent = f"calls over {path.transport or 'no connection'}: {path.reason}"
        hosts.setdefault("computes with their memory" if path.lent else sent, []).append(path.host)
    for way, names in hosts.items():
        out.print(f"{router.name} -> {', '.join(names)}: {escape(way)}")


def _print_router_service(service: RouterServiceStatus) -> None:
    calls = "" if service.process is None else f", {service.process.calls:,} calls"
    error = "" if service.error is None else f": {escape(service.error)}"
    out.print(f"router service moesaic://{service.address}  {service.state.words}{error}{calls}")


def _print_hosts(hosts: list[HostStatus]) -> None:
    shown = table("host", "state", "device", ">experts", ">weights", ">memory", ">calls", ">queue")
    for host in hosts:
        cells = [""] * 6 if host.process is None else _cells(host.process)
        state = host.state.words + (", not ready" if _is_up_but_unready(host) else "")
        shown.add_row(host.name, state, *cells)
    out.print(shown)
    for host in hosts:
        unready = f"not ready: {host.unready_reason}" if _is_up_but_unready(host) else None
        for words in (unready, host.obstacle, host.error):
            if words is not None:
                out.print(f"[yellow]{host.name}: {escape(words)}[/yellow]")
    for host in hosts:
        process = host.process
        if process is not None and process.overrun_batches:
            out.print(
                f"[yellow]{host.name}: {process.overrun_batches:,} batches took longer than the "
                f"emulated device, by up to {1e3 * process.worst_overrun_s:.1f} ms[/yellow]"
            )


def _is_up_but_unready(host: HostStatus) -> bool:
    """Return whether a host is not ready although its state does not say so."""
    absent = (HostState.STARTING, HostState.RESTARTING, HostState.GONE)
    return host.ready is False and host.state not in absent


def _print_node(node: NodeStatus) -> None:
    out.print(
        f"node {node.node[:8]}: {', '.join(node.hosts)} hold {_mib(node.weight_bytes)}; "
        f"{_mib(node.free_bytes)} of {_mib(node.memory_bytes)} are free",
        markup=False,
    )


def _print_card(card: CardStatus) -> None:
    limit = "" if card.limit_bytes is None else f" of {_mib(card.limit_bytes)}"
    out.print(
        f"card {card.card[:12]}: {', '.join(card.hosts)} hold {_mib(card.weight_bytes)} and take "
        f"{_mib(card.used_bytes)}{limit}; {_mib(card.free_bytes)} of {_mib(card.memory_bytes)} "
        "are free",
        markup=False,
    )


def _cells(process: HostProcess) -> list[str]:
    return [
        process.device,
        str(process.replicas),
        _mib(process.weight_bytes),
        _mib(process.rss_bytes),
        f"{process.calls:,}",
        str(process.queued_rows),
    ]


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"


def _print_models(cluster: ClusterStatus, engines: dict[str, EngineStatus]) -> None:
    models = table(
        "model", ">layers", ">experts", ">replicas", ">missing", ">running", ">waiting", ">parked"
    )
    for model in cluster.models:
        engine = engines.get(model.name)
        work = None if engine is None else engine.work
        requests = ["", "", ""]
        if work is not None:
            counts = work.running_requests, work.waiting_requests, work.parked_requests
            requests = [str(count) for count in counts]
        models.add_row(
            f"{model.name} ({model.dtype}{', asleep' if model.asleep else ''})",
            str(model.layers),
            str(model.experts),
            str(model.min_replicas),
            str(model.missing_experts),
            *requests,
        )
    out.print(models)
    for model in cluster.models:
        if model.updated_experts:
            words = f"{model.name}: {model.updated_experts} experts have updated weights"
            if model.volatile_experts:
                words += f", of which only hosts have {model.volatile_experts}"
            out.print(words, markup=False)
        routing = worst_routing(model.routing)
        if routing is not None:
            out.print(f"{model.name}: worst routing in {routing.words}", markup=False)


def _print_training(run: TrainingStatus) -> None:
    for line in training_lines(run):
        out.print(line, markup=False)
    owned = [
        f"{host} {count:,}" + (f" ({_mib(size)})" if (size := run.owned_bytes.get(host)) else "")
        for host, count in run.owned_tensors.items()
    ]
    if owned:
        out.print(f"tensors that hosts own: {', '.join(owned)}", markup=False)


def _print_balance(cluster: ClusterStatus) -> None:
    balancing = cluster.balancing
    age_s = balancing.plan_age_s
    looked = "has not looked at the load yet" if age_s is None else f"looked {age_s:g} s ago"
    words = [f"balancer {'on' if balancing.automatic else 'off'}, {looked}"]
    change = balancing.last_change
    if change is not None:
        words.append(
            f"change {change.id} ({change.initiator}): {change.total_moves} moves, "
            f"{change.phase.words}, {change.age_s:g} s ago"
        )
    if balancing.pending_moves:
        words.append(f"{balancing.pending_moves} replicas to come")
    if balancing.draining_hosts:
        words.append(f"draining or drained: {', '.join(balancing.draining_hosts)}")
    out.print("; ".join(words))
    for warning in cluster.warnings:
        out.print(f"[red]{warning}[/red]")


def _print_size(cluster: ClusterStatus) -> None:
    scaling = cluster.scaling
    for index, group in enumerate(scaling.groups):
        if group.min_hosts != group.max_hosts:
            busy = "" if scaling.busy_fraction is None else f"; {scaling.busy_fraction:.0%} busy"
            bounds = f"{group.min_hosts} to {group.max_hosts}"
            out.print(f"group {index}: {group.hosts} hosts of {bounds}{busy}")
    for one in scaling.recent[-3:]:
        out.print(
            f"scaling {one.id} ({one.initiator}): group {one.group} from {one.hosts_before} to "
            f"{one.target_hosts} hosts, {one.phase.words}, {one.age_s:g} s ago: {one.reason}"
        )
    if scaling.pause_reason:
        out.print(f"no scaling: {scaling.pause_reason}")
    if scaling.problem:
        out.print(f"[red]{scaling.problem}[/red]")
