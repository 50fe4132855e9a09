"""Streaming statistics of activations: constant memory, however many images pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from slimdown.errors import BadInput

NUM_BINS = 16384
_CHUNK = 1 << 22  # torch.histc counts in the float type of its input: exact up to 2**24


@dataclass(frozen=True, kw_only=True)
class RangeStatistics:
    """The extremes of the values seen, and a histogram of them over [-limit, limit]."""

    low: float
    high: float
    limit: float
    counts: Tensor  # (NUM_BINS,) float64

    @property
    def centers(self) -> Tensor:
        """The middle of each bin, (NUM_BINS,) float64."""
        edges = torch.linspace(-self.limit, self.limit, NUM_BINS + 1, dtype=torch.float64)
        return (edges[:-1] + edges[1:]) / 2


def add_values(seen: RangeStatistics | None, values: Tensor) -> RangeStatistics:
    """Return the statistics of what was seen and `values` (any shape) together.

    Where values lie beyond the histogram, its limit doubles and its bins merge in pairs: zero stays
    an edge, so no count is ever split. Raises ValueError on NaN or infinity.
    """
    low, high = (float(bound) for bound in torch.aminmax(values.detach().float()))
    farthest = max(abs(low), abs(high))
    if not farthest < float("inf"):
        raise ValueError(f"values must be finite, got a range of [{low}, {high}]")
    if seen is None:
        counts = torch.zeros(NUM_BINS, dtype=torch.float64)
        seen = RangeStatistics(low=low, high=high, limit=farthest or 1.0, counts=counts)
    while seen.limit < farthest:
        seen = _widen(seen)
    counts = seen.counts.clone()
    for chunk in torch.split(values.detach().float().reshape(-1), _CHUNK):
        histogram = torch.histc(chunk, NUM_BINS, min=-seen.limit, max=seen.limit)
        counts += histogram.cpu().double()
    return RangeStatistics(
        low=min(low, seen.low), high=max(high, seen.high), limit=seen.limit, counts=counts
    )


def observe(
    graph_module: GraphModule,
    nodes: Mapping[str, str],
    batches: Iterable[Tensor],
    *,
    after_batch: Callable[[int], None] = lambda num_images: None,
) -> dict[str, RangeStatistics]:
    """Run batches (N, C, H, W) and return the statistics of `nodes`: name -> what users call it.

    `after_batch` gets the number of images so far. Raises BadInput on NaN or infinity.
    """
    observer = _Observer(graph_module, nodes)
    num_images = 0
    with torch.no_grad():
        for batch in batches:
            observer.run(batch)
            num_images += len(batch)
            after_batch(num_images)
    return observer.statistics


def _widen(seen: RangeStatistics) -> RangeStatistics:
    """The same statistics over a histogram of twice the limit."""
    merged = seen.counts.view(-1, 2).sum(1)  # (NUM_BINS / 2,)
    rest = merged.new_zeros(NUM_BINS // 4)
    return replace(seen, limit=2 * seen.limit, counts=torch.cat([rest, merged, rest]))


class _Observer(Interpreter):
    """Runs a graph and takes note of the values of some nodes."""

    def __init__(self, graph_module: GraphModule, nodes: Mapping[str, str]) -> None:
        super().__init__(graph_module)
        self.nodes = nodes
        self.statistics: dict[str, RangeStatistics] = {}

    def run_node(self, n: Node) -> object:
        value = super().run_node(n)
        if n.name in self.nodes:
            try:
                self.statistics[n.name] = add_values(self.statistics.get(n.name), value)
            except ValueError as error:
                where = "the images" if n.op == "placeholder" else self.nodes[n.name]
                raise BadInput(
                    f"calibration met NaN or infinity in {where} ({error}): "
                    "look at the images and at the weights before this layer"
                ) from error
        return value
