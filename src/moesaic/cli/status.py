"""`moesaic status`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape

from ..handle import connect
from ..session import need_session
from .terminal import table

out = Console(highlight=False)


def read_status(name: str) -> dict[str, Any]:
    """Read the cluster's status.

    Over HTTP if it has a monitoring address, which is faster and also has the engines' figures.
    """
    session = need_session(name)
    found = {"name": name, "url": session.url, "monitoring": session.monitoring}
    if session.monitoring is not None:
        from ..client import Client

        with Client(session.monitoring) as client:
            return {**found, **client.status()}
    return {**found, "cluster": connect(name).status()}


def _bytes(value: int) -> str:
    return f"{value / 2**20:,.0f} MiB"


def _print_balance(cluster: dict[str, Any]) -> None:
    balance = cluster.get("balance")
    if balance is None:
        return
    age_s = balance["plan_age_s"]
    looked = "never" if age_s is None else f"{age_s:g} s ago"
    words = [f"balancer {'on' if balance['auto'] else 'off'}, looked at the load {looked}"]
    change = balance["last_change"]
    if change is not None:
        words.append(
            f"change {change['id']} ({change['who']}): {change['moves']} moves, {change['phase']}, "
            f"{change['age_s']:g} s ago"
        )
    if balance["moves_pending"]:
        words.append(f"{balance['moves_pending']} replicas to come")
    if balance["leaving"]:
        words.append(f"drained: {', '.join(balance['leaving'])}")
    out.print("; ".join(words))
    for warning in cluster["warnings"]:
        out.print(f"[red]{warning}[/red]")


def _print_size(cluster: dict[str, Any]) -> None:
    size = cluster.get("size")
    if size is None:
        return
    for index, group in enumerate(size["groups"]):
        if group["min"] != group["max"]:
            busy = "" if size["busy"] is None else f"; {size['busy']:.0%} busy"
            bounds = f"{group['min']} to {group['max']}"
            out.print(f"group {index}: {group['hosts']} hosts of {bounds}{busy}")
    for event in size["events"][-3:]:
        out.print(
            f"scaling {event['id']} ({event['who']}): group {event['group']} from "
            f"{event['before']} to {event['count']} hosts, {event['phase']}, {event['age_s']:g} s "
            f"ago: {event['why']}"
        )
    if size["held"]:
        out.print(f"no scaling: {size['held']}")
    if size["problem"]:
        out.print(f"[red]{size['problem']}[/red]")


def print_status(values: dict[str, Any]) -> None:
    cluster = values.get("cluster", {})
    placement = cluster.get("placement")
    out.print(f"cluster [bold]{values['name']}[/bold]  {values['url'] or '(no endpoint)'}")
    if values.get("monitoring"):
        out.print(f"monitoring: {values['monitoring']}/status, /metrics")
    if placement:
        out.print(f"placement: term {placement[0]}, epoch {placement[1]}")
    service = cluster.get("router_service")
    if service:
        calls = f", {service['calls']:,} calls" if "calls" in service else ""
        out.print(f"router service moesaic://{service['address']}  {service['state']}{calls}")
    hosts = table("host", "state", "device", ">experts", ">weights", ">memory", ">calls", ">queue")
    for host in cluster.get("hosts", []):
        hosts.add_row(
            host["host"],
            host["state"],
            host.get("device", ""),
            str(host.get("experts", "")),
            _bytes(host["weight_bytes"]) if "weight_bytes" in host else "",
            _bytes(host["rss_bytes"]) if "rss_bytes" in host else "",
            f"{host.get('calls', 0):,}",
            str(host.get("queued_rows", "")),
        )
    out.print(hosts)
    for host in cluster.get("hosts", []):
        for words in (host[key] for key in ("waiting", "error") if key in host):
            out.print(f"[yellow]{host['host']}: {escape(words)}[/yellow]")
    for host in cluster.get("hosts", []):
        if host.get("overruns"):
            out.print(
                f"[yellow]{host['host']}: {host['overruns']:,} batches took longer than the "
                f"emulated device, by up to {1e3 * host['worst_overrun_s']:.1f} ms[/yellow]"
            )
    models = table(
        "model", ">layers", ">experts", ">replicas", ">missing", ">running", ">waiting", ">parked"
    )
    engines = values.get("models", {})
    for model in cluster.get("models", []):
        engine = engines.get(model["name"], {})
        models.add_row(
            f"{model['name']} ({model['dtype']}{', asleep' if model['asleep'] else ''})",
            str(model["layers"]),
            str(model["experts"]),
            str(model["replicas"]),
            str(model["missing_experts"]),
            str(engine.get("running", "")),
            str(engine.get("waiting", "")),
            str(engine.get("parked", "")),
        )
    out.print(models)
    _print_balance(cluster)
    _print_size(cluster)
    if cluster.get("unprotected_experts"):
        out.print(
            f"[yellow]{cluster['unprotected_experts']} experts have one replica: the loss of its "
            "host makes requests wait[/yellow]"
        )
    for missing in cluster.get("missing_experts", []):
        out.print(f"[red]missing[/red] {missing}")
    if cluster.get("error"):
        out.print(f"[red]controller:[/red] {cluster['error']}")
