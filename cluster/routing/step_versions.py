"""The versions of weights that a forward pass uses: the same ones from its first layer to its last.

A placement that arrives while a pass is running is followed at once, because it may name the hosts
that take over from dead ones. Only layers whose experts' versions change in it stay as they were
until the pass ends. Until then the router reports the number of the placement before, so that no
host evicts the older versions.
"""

from __future__ import annotations

from dataclasses import replace

from ..placement import Placement


def until_step_ends(followed: Placement, newer: Placement) -> Placement:
    """Return what to follow while a forward pass runs that began under ``followed``.

    It is ``newer`` itself if that changes no version of the layers in ``followed``.
    """
    changed = {
        key
        for key in followed.layers.keys() & newer.layers.keys()
        if followed.versions.layer(key) != newer.versions.layer(key)
    }
    if not changed:
        return newer
    layers = {
        key: followed.layers[key] if key in changed else layer
        for key, layer in newer.layers.items()
        if key in followed.layers
    }
    return replace(newer, id=followed.id, layers=layers, versions=followed.versions)
