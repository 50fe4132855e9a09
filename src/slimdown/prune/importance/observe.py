"""What the layers of a captured graph read, channel by channel, over many images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from slimdown.prune.probe import require_finite
from slimdown.prune.running import Run


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Of each channel over all samples and places, (C,) each, in float64."""

    count: int
    mean: Tensor
    mean_abs: Tensor
    variance: Tensor
    """About the mean, divided by the count."""

    def merge(self, other: Moments) -> Moments:
        """The moments of both together. Chan 1979: exact however far the means are from zero."""
        count = self.count + other.count
        share = other.count / count
        apart = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + share * apart,
            mean_abs=self.mean_abs + share * (other.mean_abs - self.mean_abs),
            variance=self.variance
            + share * (other.variance - self.variance)
            + share * (1 - share) * apart.square(),
        )


def moments_of(values: Tensor, axis: int) -> Moments:
    """The moments of one batch, whose channels are along `axis`."""
    values = values.detach().movedim(axis, 0).flatten(1).float()  # (C, samples and places)
    variance, mean = torch.var_mean(values, 1, correction=0)
    return Moments(
        count=values.shape[1],
        mean=mean.double().cpu(),
        mean_abs=values.abs().mean(1).double().cpu(),
        variance=variance.double().cpu(),
    )


def observe(
    graph_module: GraphModule, points: Mapping[Node, int], batches: Iterable[Tensor]
) -> dict[Node, Moments]:
    """The moments of some nodes' values; each node comes with the axis of its channels."""
    observer = _Observer(graph_module, points)
    with torch.no_grad():
        for batch in batches:
            require_finite(observer.run(batch))
    return observer.found


class _Observer(Run):
    def __init__(self, graph_module: GraphModule, points: Mapping[Node, int]) -> None:
        super().__init__(graph_module)
        self.points = points
        self.found: dict[Node, Moments] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self.points:
            seen = moments_of(value, self.points[n])
            self.found[n] = self.found[n].merge(seen) if n in self.found else seen
        return value
