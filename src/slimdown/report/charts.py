"""Small charts, each a pure function from figures to an inline SVG of about 340 pixels' width.

One language of color all over: gray is before or observed, the accent is after or representable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from slimdown.core import Json
from slimdown.report.compare import Row
from slimdown.report.formats import NOT_MEASURED, format_bytes, format_ms, format_value
from slimdown.report.svg import AFTER, BEFORE, INK, LINE, MUTED, PAPER, SETTINGS, inline_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array: TypeAlias = npt.NDArray[np.float64]

WIDTH = 340.0
"""Pixels at which its text is read well, on a phone and in three columns."""

FONT = 11.5
LABELS = 84.0  # pixels left of the bars, for the names of steps
MAX_LABEL = 12
VALUES = 72.0  # pixels right of them, for the figures
ROW = 25.0
MOST_LAYERS = 20


def draw_accuracies(rows: Sequence[Row], *, name: str) -> str:
    """Each step's score with its 95 % interval, a dot on a line; a dashed line at the first's."""
    with _drawing(len(rows) * ROW + 8) as (figure, axes):
        for y, row in enumerate(rows):
            accuracy = row.measured.accuracy
            if accuracy is None:
                continue
            color, alpha = _paint(y, len(rows))
            if y == 0:
                axes.axvline(accuracy.value, color=BEFORE, linewidth=1, dashes=(2, 3), zorder=0)
            if accuracy.low is not None and accuracy.high is not None:
                bounds = [accuracy.low, accuracy.high]
                axes.plot(bounds, [y, y], color=color, linewidth=2, alpha=alpha)
            axes.plot(accuracy.value, y, "o", color=color, markersize=8, markeredgecolor=PAPER)
        axes.margins(x=0.04)
        _hide_x_axis_(axes, len(rows))
        _label_rows_(axes, rows, [format_value(row.score) for row in rows])
        return inline_svg(figure, name=name, label="Accuracy after each step")


def draw_sizes(rows: Sequence[Row], *, name: str) -> str:
    """Each step's file size, as bars from zero."""
    sizes = [row.measured.size_bytes for row in rows]
    texts = [format_bytes(size) for size in sizes]
    return _draw_bars(rows, sizes, texts, name=name, label="File size after each step")


def draw_medians(rows: Sequence[Row], *, name: str) -> str:
    """Each step's median latency, as bars from zero."""
    medians = [row.median_ms for row in rows]
    texts = [format_ms(median) for median in medians]
    return _draw_bars(rows, medians, texts, name=name, label="Median latency after each step")


def draw_latencies(rows: Sequence[Row], *, name: str) -> str:
    """How each step's timed calls are distributed, as ridges of equal height; a mark a median."""
    timed = [(row, row.measured.latency) for row in rows if row.measured.latency is not None]
    # The slowest 2 % of all calls are the machine's own interruptions; they would squeeze the rest.
    limit = max(float(np.percentile(latency.samples_ms, 98)) for _, latency in timed) * 1.05
    bins = np.linspace(0.0, limit, 121)
    with _drawing(len(timed) * 34 + 34, bottom=34) as (figure, axes):
        for y, (_, latency) in enumerate(timed):
            counts, _ = np.histogram(latency.samples_ms, bins)
            heights = 0.8 * counts / max(1, counts.max())
            color, alpha = _paint(y, len(timed))
            axes.stairs(y - heights, bins, baseline=y, fill=True, color=color, alpha=0.8 * alpha)
            axes.plot([0, limit], [y, y], color=LINE, linewidth=1, zorder=0)
            axes.plot([latency.median_ms] * 2, [y - 0.86, y + 0.04], color=INK, linewidth=1.5)
        axes.set_xlim(0, limit)
        texts = [format_ms(latency.median_ms) for _, latency in timed]
        axes.set_ylim(len(timed) - 0.9, -0.9)
        _label_rows_(axes, [row for row, _ in timed], texts, lift=0.25)
        axes.set_xlabel("milliseconds a call", labelpad=2)
        return inline_svg(figure, name=name, label="Distribution of latencies after each step")


def draw_widths(widths: Mapping[str, Sequence[int]], *, name: str) -> str:
    """Channels of each layer in the network's order: before as a gray skyline, after in front."""
    before, after = (np.array(each, dtype=float) for each in zip(*widths.values(), strict=True))
    edges = np.arange(len(before) + 1)
    with _drawing(150, left=40, right=6, top=8, bottom=34) as (figure, axes):
        axes.stairs(before, edges, fill=True, color=BEFORE, alpha=0.5)
        axes.stairs(after, edges, fill=True, color=AFTER)
        axes.set_xlim(0, len(before))
        axes.set_ylim(0, 1.05 * max(before.max(), after.max()))
        axes.set_xlabel(f"{len(before)} layers, first to last", labelpad=4)
        axes.set_xticks([])
        _grid_(axes)
        return inline_svg(figure, name=name, label="Channels of each layer before and after")


def draw_sensitivity(curves: Mapping[str, Sequence[Sequence[float]]], *, name: str) -> str:
    """The output's error against the share kept of one group alone, a line a group; worst named."""
    worst = max(curves, key=lambda group: max(error for _, error in curves[group]))
    with _drawing(150, left=40, right=8, top=8, bottom=34) as (figure, axes):
        for group, points in curves.items():
            pairs = sorted([(share, error) for share, error in points] + [(1.0, 0.0)])
            shares, errors = zip(*pairs, strict=True)
            color, alpha, width = (AFTER, 1.0, 2.0) if group == worst else (MUTED, 0.5, 1.2)
            axes.plot(shares, errors, color=color, alpha=alpha, linewidth=width)
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"share kept of one group; {_short(worst)} matters most", labelpad=2)
        _grid_(axes)
        return inline_svg(figure, name=name, label="Error of the output against the share kept")


def draw_layer_errors(errors: Mapping[str, float], *, name: str) -> str:
    """The output's error where one layer alone is quantized, worst first; the worst 20 of them."""
    worst = sorted(errors.items(), key=lambda each: -each[1])[:MOST_LAYERS]
    finite = [error for _, error in worst if np.isfinite(error)]
    longest = max([*finite, 1e-12])
    with _drawing(len(worst) * 17 + 8, left=WIDTH / 2, right=60) as (figure, axes):
        for y, (_, error) in enumerate(worst):
            axes.barh(y, min(error, longest), height=0.6, color=AFTER)
        axes.set_xlim(0, longest)
        _hide_x_axis_(axes, len(worst))
        # the end of a label tells layers apart, the beginning is the same for many of them
        labels = [label if len(label) <= 26 else f"…{label[-25:]}" for label, _ in worst]
        _label_places_(axes, range(len(worst)), labels, pad=WIDTH / 2)
        _write_values_(axes, range(len(worst)), [f"{error:.2g}" for _, error in worst])
        return inline_svg(figure, name=name, label="Error of the output with one layer quantized")


def draw_ranges(ranges: Sequence[Json], *, name: str, label: str) -> str:
    """What each tensor was seen to hold (gray) and the limits of its scale (accent marks)."""
    low, high, clipped_low, clipped_high = (
        np.array([each[key] for each in ranges], dtype=np.float64)
        for key in ("low", "high", "clipped_low", "clipped_high")
    )
    places = np.arange(len(ranges), dtype=np.float64)
    with _drawing(150, left=40, right=6, top=8, bottom=34) as (figure, axes):
        # One path with gaps in it, where a bar a tensor would be hundreds.
        edges = _interleave(places - 0.36, places + 0.36)
        tops, bottoms = (
            _interleave(values, np.full_like(values, np.nan)) for values in (high, low)
        )
        axes.stairs(tops[:-1], edges, baseline=bottoms[:-1], fill=True, color=BEFORE, alpha=0.6)
        for limits in (clipped_low, clipped_high):
            nothing = np.full_like(places, np.nan)
            marks = _interleave(places - 0.45, places + 0.45, nothing)
            axes.plot(marks, _interleave(limits, limits, nothing), color=AFTER, linewidth=2)
        axes.set_xlim(-0.8, len(ranges) - 0.2)
        axes.set_xlabel(f"{len(ranges)} tensors, first to last", labelpad=4)
        axes.set_xticks([])
        _grid_(axes)
        return inline_svg(figure, name=name, label=label)


def draw_losses(history: Sequence[Json], *, name: str) -> str:
    """The loss of each epoch (accent), with its hard (gray, dashed) and soft (gray) terms."""
    epochs = [record["epoch"] for record in history]
    with _drawing(150, left=40, right=8, top=8, bottom=34) as (figure, axes):
        for key, color, width, dashes in (
            ("hard", MUTED, 1.2, (2, 2)),
            ("soft", MUTED, 1.2, (None, None)),
            ("loss", AFTER, 2.2, (None, None)),
        ):
            values = _known(history, key)
            if not np.isnan(values).all():
                axes.plot(epochs, values, color=color, linewidth=width, dashes=dashes)
        _epoch_axis_(axes, epochs)
        return inline_svg(figure, name=name, label="Loss of each epoch")


def draw_validation(history: Sequence[Json], *, name: str) -> str:
    """The score on held-out training data after the epochs in which it was taken."""
    epochs = np.array([record["epoch"] for record in history])
    values = _known(history, "validation")
    is_known = ~np.isnan(values)
    with _drawing(150, left=40, right=8, top=8, bottom=34) as (figure, axes):
        axes.plot(
            epochs[is_known], values[is_known], "o-", color=AFTER, linewidth=2.2, markersize=4
        )
        _epoch_axis_(axes, epochs.tolist())
        return inline_svg(figure, name=name, label="Validation score after each epoch")


def has_validation(history: Sequence[Json]) -> bool:
    """Whether any epoch was validated."""
    return not np.isnan(_known(history, "validation")).all()


def _draw_bars(
    rows: Sequence[Row],
    values: Sequence[float | None],
    texts: Sequence[str],
    *,
    name: str,
    label: str,
) -> str:
    with _drawing(len(rows) * ROW + 8) as (figure, axes):
        for y, value in enumerate(values):
            color, alpha = _paint(y, len(rows))
            axes.barh(y, value or 0.0, height=0.5, color=color, alpha=alpha)
        axes.set_xlim(0, max([value for value in values if value] or [1.0]))
        _hide_x_axis_(axes, len(rows))
        _label_rows_(axes, rows, texts)
        return inline_svg(figure, name=name, label=label)


@contextmanager
def _drawing(
    height: float, *, left: float = LABELS, right: float = VALUES, top: float = 4, bottom: float = 4
) -> Iterator[tuple[Figure, Axes]]:
    """Lend a figure of `height` pixels whose axes leave these margins, without any frame."""
    from matplotlib import style
    from matplotlib.figure import Figure

    # From the defaults on: a user's matplotlibrc must not change the page.
    with style.context(["default", {**SETTINGS, "font.size": FONT}]):
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        box = (
            left / WIDTH,
            bottom / height,
            (WIDTH - left - right) / WIDTH,
            (height - top - bottom) / height,
        )
        axes = figure.add_axes(box)
        axes.set_frame_on(False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set_color(MUTED)
        axes.tick_params(colors=MUTED, length=0)
        yield figure, axes


def _hide_x_axis_(axes: Axes, num_rows: int) -> None:
    axes.set_xticks([])
    axes.set_ylim(num_rows - 0.5, -0.5)  # the first row on top


def _label_rows_(
    axes: Axes, rows: Sequence[Row], texts: Sequence[str], *, lift: float = 0.0
) -> None:
    """Names on the left, figures on the right, `lift` rows above each row's line."""
    places = [y - lift for y in range(len(rows))]
    _label_places_(axes, places, [_short(row.label) for row in rows], pad=LABELS)
    _write_values_(axes, places, texts)


def _label_places_(
    axes: Axes, places: Sequence[float], labels: Sequence[str], *, pad: float
) -> None:
    """Names on the left, `pad` pixels before the bars."""
    axes.set_yticks(places, labels)
    axes.tick_params(axis="y", labelcolor=INK, pad=pad)
    for label in axes.get_yticklabels():
        label.set_horizontalalignment("left")


def _write_values_(axes: Axes, places: Sequence[float], texts: Sequence[str]) -> None:
    """Figures on the right."""
    for y, text in zip(places, texts, strict=True):
        axes.annotate(
            text,
            (1.0, y),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=MUTED if text == NOT_MEASURED else INK,
        )


def _epoch_axis_(axes: Axes, epochs: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlim(min(epochs) - 0.2, max(epochs) + 0.2)
    axes.set_xlabel("epoch", labelpad=2)
    _grid_(axes)


def _grid_(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y", color=LINE, linewidth=1)
    axes.set_axisbelow(True)


def _interleave(*arrays: Array) -> Array:
    """(N,) arrays as one of all their first values, all their second values, and so on."""
    return np.stack(arrays, axis=1).ravel()


def _short(label: str) -> str:
    """A label that fits left of the bars."""
    return label if len(label) <= MAX_LABEL else label[: MAX_LABEL - 1] + "…"


def _paint(index: int, count: int) -> tuple[str, float]:
    """Color and opacity of a step: the original gray, the result in full accent, between pale."""
    if index == 0:
        return BEFORE, 1.0
    return AFTER, 1.0 if index == count - 1 else 0.45


def _known(history: Sequence[Json], key: str) -> Array:
    """One figure of each epoch, (num_epochs,); NaN where it is unknown."""
    values = [record.get(key) for record in history]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
