"""What the command line can do a Python program can do, under a name of its own."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pytest
import typer.main

from moesaic.cli.main import app

# Command -> where it is in Python.
IN_PYTHON = {
    "apply": "moesaic:Cluster.apply",
    "bench": "moesaic:measure_load",
    "chat": "moesaic:Client.stream_chat",
    "complete": "moesaic:Client.stream_complete",
    "down": "moesaic:Cluster.down",
    "drain": "moesaic:Cluster.drain",
    "experts": "moesaic:Cluster.experts",
    "expert get": "moesaic:Cluster.get_expert",
    "expert put": "moesaic:Cluster.update_expert",
    "expert revert": "moesaic:Cluster.revert_expert",
    "history": "moesaic:Cluster.history",
    "inspect": "moesaic:inspect_model",
    "logs": "moesaic:Cluster.logs",
    "page": "moesaic.page_address:open_page",
    "pin": "moesaic:Cluster.pin",
    "plan": "moesaic:Cluster.plan",
    "rebalance": "moesaic:Cluster.rebalance",
    "record": "moesaic:Cluster.record",
    "replicate": "moesaic:Cluster.replicate",
    "rollback": "moesaic:Cluster.rollback",
    "scale": "moesaic:Cluster.scale",
    "simulate": "moesaic.cluster.comparison.compare:compare",
    "spec check": "moesaic:check_spec",
    "spec docs": "moesaic.cluster.spec.page:spec_page",
    "spec schema": "moesaic:Spec.model_json_schema",
    "status": "moesaic:Cluster.status",
    "top": "moesaic:Cluster.top",
    "train": "moesaic:train",
    "undrain": "moesaic:Cluster.undrain",
    "unpin": "moesaic:Cluster.unpin",
    "up": "moesaic:up",
    "upcycle": "moesaic:upcycle",
    "version": "moesaic:versions",
}
# What options say that is no matter of a Python program's.
OF_A_TERMINAL = {
    "as_json", "detach", "experts", "file", "force", "interval", "message", "name", "once",
    "only_print", "out", "url", "watch", "yes",
}  # fmt: skip
# Options by another name: Client's are those of `openai_wire.Options`.
SAID_OTHERWISE = {
    "train": {"data": "spec", "steps": "spec", "folder": "spec"},
    "drain": {"timeout": "timeout_s"},
    "down": {"drain": "drain_s"},
    "record": {"window": "window_s"},
    "expert put": {"files": "tensors", "timeout": "timeout_s"},
    "expert revert": {"timeout": "timeout_s"},
    "replicate": {"replicas": "count", "timeout": "timeout_s of wait_for"},
    "pin": {"timeout": "timeout_s of wait_for"},
    "unpin": {"timeout": "timeout_s of wait_for"},
    "undrain": {"timeout": "timeout_s of wait_for"},
    "rebalance": {"timeout": "timeout_s of wait_for"},
    "scale": {"hosts": "count", "timeout": "timeout_s"},
    "rollback": {"change": "number"},
    "bench": {"seconds": "limit_s"},
    "inspect": {"memory": "Described.hosts", "replicas": "Described.hosts"},
    "logs": {"kinds": "kinds"},
    "upcycle": {"text": "texts"},
}
# Whose options are not arguments one by one.
WHOLE = {"chat", "complete", "simulate", "spec check"}


def commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    found = {}
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        found |= {f"{name} {one}": c for one, c in inner.items()} if inner else {name: command}
    return found


def resolve(where: str) -> Any:
    module, _, path = where.partition(":")
    found = import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


def test_every_command_is_in_the_table() -> None:
    assert set(commands()) == set(IN_PYTHON)


@pytest.mark.parametrize("command", sorted(IN_PYTHON))
def test_a_command_has_a_documented_function_with_its_options(command: str) -> None:
    function = resolve(IN_PYTHON[command])
    assert callable(function)
    assert inspect.getdoc(function) or command in ("chat", "complete")
    if command in WHOLE:
        return
    arguments = set(inspect.signature(function).parameters)
    options = {one.name for one in commands()[command].params} - OF_A_TERMINAL - {"help"}
    said = SAID_OTHERWISE.get(command, {})
    assert options - arguments - said.keys() == set()
    assert said.keys() <= options, "no name of an option that is gone"
