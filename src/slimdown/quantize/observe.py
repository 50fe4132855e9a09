"""Streaming statistics of activations: constant memory, however many images pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from math import gcd
from types import MappingProxyType

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from slimdown.errors import BadInput

BINS_AN_OCTAVE = 256
"""Bins between a power of two and the next: 2 a step or more where 8 bits span what was seen."""

NUM_BINS = 2 * 64 * BINS_AN_OCTAVE + 1
"""64 octaves of negative values, one bin around zero, 64 octaves of positive values."""

SMALLEST, LARGEST = 2.0**-32, 2.0**32
"""Magnitudes below count as zero; those beyond count in the last bin."""

_BITS_DROPPED = 15  # of the 23 of a float32's mantissa; 8 stay, for 256 bins an octave
_CODES_A_SIGN = 1 << 16  # 8 bits of exponent and 8 of mantissa
_FIRST_CODE = (127 - 32) * BINS_AN_OCTAVE  # of SMALLEST: float32 stores exponents with 127 added
_LAST_CODE = (127 + 32) * BINS_AN_OCTAVE  # of LARGEST
_CHUNK = 1 << 20  # values counted at once: their codes stay in the cache

MOST_COUNTED = 1 << 14
"""Values of an image that are counted; of more, equally spaced ones. Extremes are of all."""


@dataclass(frozen=True, kw_only=True)
class RangeStatistics:
    """The extremes of the values seen, exactly, and how many lay in each bin."""

    low: float
    high: float
    mean_low: float
    """The mean over images of the least value of each."""
    mean_high: float
    counts: Tensor
    """Of all values, bin by bin from the most negative, (NUM_BINS,) int64."""
    held_out: Tensor
    """The part of `counts` that every fourth image gave, (NUM_BINS,) int64."""
    num_images: int

    def histogram(self) -> tuple[Tensor, Tensor]:
        """The middles of the bins that hold values, ascending, and their counts; float64, (B,).

        A middle beyond the extremes is put on them: what is constant is seen as it is.
        """
        present = self.counts > 0
        return self.middles()[present], self.counts[present].double()

    def middles(self) -> Tensor:
        """The middle of each bin, within the extremes, (NUM_BINS,) float64."""
        edges = bin_edges()
        middles = (edges[:-1] + edges[1:]) / 2
        return middles.clamp(min=min(self.low, 0.0), max=max(self.high, 0.0))


@cache
def bin_edges() -> Tensor:
    """Where bins begin and end, ascending, (NUM_BINS + 1,) float64."""
    steps = torch.arange((NUM_BINS - 1) // 2 + 1, dtype=torch.float64)
    octaves, rest = (steps / BINS_AN_OCTAVE).floor(), steps % BINS_AN_OCTAVE
    positive = SMALLEST * 2.0**octaves * (1 + rest / BINS_AN_OCTAVE)
    return torch.cat([-positive.flip(0), positive])


def add_values(
    seen: RangeStatistics | None, values: Tensor, *, num_images: int = 1
) -> RangeStatistics:
    """Return the statistics of what was seen and `values` together.

    `values` are what `num_images` images gave, of any shape with the images outermost; where they
    cannot be told apart they count as one. Every fourth image of all is held out. Raises ValueError
    on NaN or infinity.
    """
    rows = _by_image(values, num_images)
    # Image by image: along a dimension, torch's aminmax takes fifteen times as long.
    extremes = torch.stack([torch.stack(torch.aminmax(row)) for row in rows])  # (images, 2)
    lows, highs = extremes.unbind(1)
    low, high = float(lows.min()), float(highs.max())
    if not max(abs(low), abs(high)) < float("inf"):
        raise ValueError(f"values must be finite, got a range of [{low}, {high}]")
    before = 0 if seen is None else seen.num_images
    together = before + len(rows)
    # The last images of each batch, as many as keep it at every fourth: slices need no copy.
    num_fitted = len(rows) - (together // 4 - before // 4)
    rows = rows[:, :: _spacing(rows.shape[1])]
    held_out = count_values(rows[num_fitted:])
    counts = count_values(rows[:num_fitted]) + held_out
    mean_low, mean_high = float(lows.double().mean()), float(highs.double().mean())
    if seen is not None:
        low, high = min(low, seen.low), max(high, seen.high)
        share = len(rows) / together
        mean_low = seen.mean_low + share * (mean_low - seen.mean_low)
        mean_high = seen.mean_high + share * (mean_high - seen.mean_high)
        counts += seen.counts
        held_out += seen.held_out
    return RangeStatistics(
        low=low,
        high=high,
        mean_low=mean_low,
        mean_high=mean_high,
        counts=counts,
        held_out=held_out,
        num_images=together,
    )


def count_values(values: Tensor) -> Tensor:
    """How many of the float32 `values` (any shape) lie in each bin, (NUM_BINS,) int64.

    The first bits of a float are its sign, its octave and its place in the octave, in this order:
    they are the number of its bin. Three times faster than torch.histc, and no limits to choose.
    """
    table = torch.zeros(2 * _CODES_A_SIGN, dtype=torch.int32, device=values.device)
    one = torch.ones(1, dtype=torch.int32, device=values.device)
    for chunk in torch.split(values.reshape(-1), _CHUNK):
        codes = (chunk.view(torch.int32) >> _BITS_DROPPED).add_(_CODES_A_SIGN)
        table.index_add_(0, codes, one.expand(len(codes)))  # bincount's table costs more than it
    by_sign = table.cpu().view(2, _CODES_A_SIGN)  # the sign bit makes an int32 negative
    near_zero = by_sign[:, :_FIRST_CODE].sum().view(1)
    negative, positive = by_sign[:, _FIRST_CODE:_LAST_CODE].long()
    negative[-1] += by_sign[0, _LAST_CODE:].sum()
    positive[-1] += by_sign[1, _LAST_CODE:].sum()
    return torch.cat([negative.flip(0), near_zero, positive])


def observe(
    graph_module: GraphModule,
    nodes: Mapping[str, str],
    batches: Iterable[Tensor],
    *,
    labels: Mapping[str, str] = MappingProxyType({}),
    after_batch: Callable[[int], None] = lambda num_images: None,
) -> dict[str, RangeStatistics]:
    """Run batches (N, C, H, W) and return statistics of `nodes`: name -> what to count it under.

    `labels` tell what users call a node, and `after_batch` gets the number of images so far.
    Raises BadInput on NaN or infinity.
    """
    observer = _Observer(graph_module, nodes, labels)
    num_images = 0
    with torch.no_grad():
        for batch in batches:
            observer.num_images = len(batch)
            observer.run(batch)
            num_images += len(batch)
            after_batch(num_images)
    return observer.statistics


def _by_image(values: Tensor, num_images: int) -> Tensor:
    """Values as memory holds them, float32, (num_images, values of each), or one row of all."""
    if num_images < 1 or values.ndim == 0 or len(values) % num_images:
        num_images = 1
    # Channels-last activations too are read as they lie: a copy costs as much as counting.
    dims = sorted(range(values.ndim), key=values.stride, reverse=True)
    in_memory = values.detach().float().permute(dims)
    if dims[:1] != [0] and num_images > 1:
        in_memory = values.detach().float()
    return in_memory.reshape(num_images, -1)


def _spacing(num_values: int) -> int:
    """From one counted value of an image to the next: no period of the values divides it."""
    spacing = -(-num_values // MOST_COUNTED)
    while gcd(spacing, num_values) > 1:
        spacing += 1
    return spacing


class _Observer(Interpreter):
    """Runs a graph and takes note of the values of some nodes; drops each after its last use."""

    def __init__(
        self, graph_module: GraphModule, nodes: Mapping[str, str], labels: Mapping[str, str]
    ) -> None:
        super().__init__(graph_module, garbage_collect_values=True)
        self.extra_traceback = False  # of errors that users read
        self.nodes, self.labels = nodes, labels
        self.num_images = 1
        self.statistics: dict[str, RangeStatistics] = {}

    def run_node(self, n: Node) -> object:
        value = super().run_node(n)
        if n.name in self.nodes:
            try:
                key = self.nodes[n.name]
                seen = self.statistics.get(key)
                self.statistics[key] = add_values(seen, value, num_images=self.num_images)
            except ValueError as error:
                where = "the images" if n.op == "placeholder" else self.labels.get(n.name, n.name)
                raise BadInput(
                    f"calibration met NaN or infinity in {where} ({error}): "
                    "look at the images and at the weights before this layer"
                ) from error
        return value
