"""Whether gates still use all of their experts: figures of each layer, and layers that collapsed.

The loss does not show it when gates send all tokens to a few experts. A `RoutingWatch` sees it from
counts of assignments alone, so the controller uses it on what routers report, and a loop that
trains on the counts of its own steps.

Shape suffixes: E = experts of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..expert_keys import LayerKey
from ..reports.report import LayerRouting, worst_routing

# A sample has so many assignments for each expert of a layer, or more. An expert with half of an
# even share then has no token with a chance of e^-10. A layer is judged by its last two samples
# together: a router may report the two parts of a call, lent and sent, one after the other, and
# each part has some experts only.
LEAST_PER_EXPERT = 20
# A layer collapses, or recovers, when so many samples say so without a break; larger ones count as
# several. With fewer than 4 assignments for each expert in a step, that takes more than 20 steps.
AGREEING = 3
# The same for a model that is served and not trained: its gates stay as they are, so there is no
# hurry, and one conversation about one thing uses few experts for a while.
AGREEING_SERVED = 30


@dataclass(frozen=True, slots=True)
class RoutingFigures:
    """How the assignments of one layer are spread over its experts."""

    experts: int
    assignments: float
    entropy: float  # of the experts' parts of the assignments / ln E: 1 is even, 0 is one expert
    max_over_mean: float  # assignments of the busiest expert / their mean over experts
    dead_experts: int  # without an assignment
    busiest_expert: int


def routing_figures(counts_E: ArrayLike) -> RoutingFigures | None:
    """Return the figures of a layer whose experts had so many assignments; None if none had any.

    Raises ValueError for what are no counts of experts.
    """
    counts_E = np.asarray(counts_E, dtype=np.float64)
    if counts_E.ndim != 1 or not counts_E.size:
        raise ValueError(f"counts: shape {counts_E.shape}; give one count for each expert")
    if not np.isfinite(counts_E).all() or (counts_E < 0).any():
        raise ValueError("counts: some are negative or not finite; give numbers of assignments")
    total, experts = float(counts_E.sum()), counts_E.size
    if not total:
        return None
    part_E = counts_E / total
    used = part_E[part_E > 0]
    entropy = -float((used * np.log(used)).sum()) / math.log(experts) if experts > 1 else 1.0
    return RoutingFigures(
        experts=experts,
        assignments=total,
        entropy=min(max(entropy, 0.0), 1.0),
        max_over_mean=float(part_E.max()) * experts,
        dead_experts=int((counts_E == 0).sum()),
        busiest_expert=int(counts_E.argmax()),
    )


@dataclass(frozen=True, slots=True)
class _Bounds:
    """What makes a layer collapsed; one of the three is enough.

    A token has k different experts. If all tokens choose the same ones, the maximum over the mean
    is E / k, the entropy ln k / ln E, and E - k experts are dead; with even gates they are 1, 1
    and 0. The first two bounds are places between both ends, so they suit each E and k.
    """

    # All tokens choose one expert: the maximum over the mean is so far from 1 to E / k, or farther.
    # The other experts of each token may be spread evenly.
    peak: float
    # Most assignments go to a few experts: the entropy is so far from ln k / ln E to 1, or less.
    # That are E^spread * k^(1 - spread) equal experts.
    spread: float
    # More than this part of the experts is dead.
    dead: float

    def hold(self, found: RoutingFigures, experts_per_token: int) -> bool:
        """Return whether the figures are those of a collapsed layer."""
        experts, chosen = found.experts, experts_per_token
        if not 1 <= chosen < experts:
            return False  # gates have no choice
        even = math.log(experts)
        peak = (found.max_over_mean - 1) / (experts / chosen - 1)
        spread = (found.entropy * even - math.log(chosen)) / (even - math.log(chosen))
        dead = found.dead_experts / experts
        return peak >= self.peak or spread <= self.spread or dead > self.dead


# Popular experts are no collapse: if the chances of 128 experts follow Zipf's law with exponent 1,
# and a token takes 8 of them, the peak is 0.83 and the spread 0.74. The two sets of bounds are
# apart, so that a layer at the edge of one does not come and go.
_COLLAPSES = _Bounds(peak=0.95, spread=0.25, dead=0.5)
_STAYS = _Bounds(peak=0.85, spread=0.35, dead=0.4)


@dataclass(slots=True)
class _Layer:
    counts_E: np.ndarray  # float64, of the sample that grows
    last_E: np.ndarray | None = None  # of the one before it
    agreeing: int = 0  # samples that say that `collapsed` should change
    collapsed: bool = False
    figures: RoutingFigures | None = None  # those it was last judged by


class RoutingWatch:
    """The routing of layers, each judged again and again by its newest assignments."""

    def __init__(self) -> None:
        self._layers: dict[LayerKey, _Layer] = {}

    def add(
        self,
        key: LayerKey,
        counts_E: ArrayLike,
        *,
        experts_per_token: int | None = None,
        agreeing: int = AGREEING,
    ) -> None:
        """Take the (E,) assignments that a layer's experts had since the last time: of a step, say.

        ``experts_per_token`` is how many the gates choose. If it is None, 1 is assumed, and a layer
        counts as collapsed only when experts are dead or nearly all assignments are one expert's.
        Raises ValueError for what are no counts of experts.
        """
        added = routing_figures(counts_E)
        if added is None:
            return
        layer = self._layers.get(key)
        if layer is None or layer.counts_E.size != added.experts:
            layer = self._layers[key] = _Layer(np.zeros(added.experts))
        layer.counts_E = layer.counts_E + np.asarray(counts_E, dtype=np.float64)
        sample_E, least = layer.counts_E, LEAST_PER_EXPERT * added.experts
        if sample_E.sum() < least:
            return
        before_E, layer.last_E = layer.last_E, sample_E
        layer.counts_E = np.zeros(added.experts)
        if before_E is None:
            return
        found = layer.figures = routing_figures(before_E + sample_E)
        assert found is not None
        bounds = _STAYS if layer.collapsed else _COLLAPSES
        if bounds.hold(found, experts_per_token or 1) == layer.collapsed:
            layer.agreeing = 0
            return
        newly_E = sample_E if layer.agreeing else before_E + sample_E
        layer.agreeing += int(newly_E.sum()) // least
        if layer.agreeing >= agreeing:
            layer.collapsed, layer.agreeing = not layer.collapsed, 0

    def keep(self, keys: Collection[LayerKey]) -> None:
        """Forget all layers but these."""
        self._layers = {key: layer for key, layer in self._layers.items() if key in keys}

    def layers(self, model: str) -> list[LayerRouting]:
        """Return the routing of a model's layers that had enough assignments, in their order."""
        return [
            LayerRouting(
                layer=key.layer,
                experts=found.experts,
                entropy=round(found.entropy, 4),
                max_over_mean=round(found.max_over_mean, 3),
                dead_experts=found.dead_experts,
                busiest_expert=found.busiest_expert,
                collapsed=layer.collapsed,
            )
            for key, layer in sorted(self._layers.items(), key=lambda one: one[0])
            if key.model == model and (found := layer.figures) is not None
        ]

    def worst(self, model: str) -> LayerRouting | None:
        """Return the routing of the model's worst layer; None before there is any."""
        return worst_routing(self.layers(model))

    def warning(self, model: str, *, trained: bool = True) -> str | None:
        """Return a text if layers of a model have collapsed: which, how far, and what helps.

        A loop that trains one model may use "" for its name.
        """
        layers = self.layers(model)
        collapsed = [one for one in layers if one.collapsed]
        worst = worst_routing(collapsed)
        if worst is None:
            return None
        advice = (
            "raise the balance loss (`balance_loss`), lower the learning rate, or go back to a "
            "checkpoint from before"
            if trained
            else "the gates of its checkpoint are so, or all requests are alike"
        )
        routing = f"the routing of {model}" if model else "the routing"
        return (
            f"{routing} has collapsed in {len(collapsed)} of {len(layers)} layers, the worst is "
            f"{worst.words}; {advice}"
        )
