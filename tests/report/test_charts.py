"""Charts say what the figures say."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import matplotlib
import pytest

from slimdown.core import Report
from slimdown.report import charts
from slimdown.report.compare import compare_targets


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter("text")]


def test_bars_are_as_long_as_their_figures(report: Report) -> None:
    (rows, _) = (comparison.rows for comparison in compare_targets(report))
    svg = charts.draw_sizes(rows, name="sizes")
    bars = [
        [float(x) for x in re.findall(r"[ML] ([\d.]+)", element.attrib["d"])]
        for element in ET.fromstring(svg).iter("path")
        if element.attrib.get("fill") in ("var(--before)", "var(--after)")
    ]
    lengths = [max(xs) - min(xs) for xs in bars]
    sizes = [row.measured.size_bytes for row in rows]
    assert sizes[0] is not None
    assert [length / lengths[0] for length in lengths] == pytest.approx(
        [(size or 0) / sizes[0] for size in sizes], abs=0.01
    )
    assert {"Original", "3 Quantize", "1.88 MB", "287 kB"} <= set(texts(svg))


def test_a_step_that_was_not_measured_says_so(report: Report) -> None:
    rows = list(compare_targets(report)[0].rows)
    rows[1] = replace(rows[1], measured=replace(rows[1].measured, latency=None, accuracy=None))
    for draw in (charts.draw_medians, charts.draw_accuracies):
        assert texts(draw(rows, name="x")).count("not measured") == 1
    assert len(texts(charts.draw_latencies(rows, name="x"))) > 6


def test_long_names_are_cut(report: Report) -> None:
    rows = [replace(row, label="a-very-long-name") for row in compare_targets(report)[0].rows]
    assert "a-very-long…" in texts(charts.draw_sizes(rows, name="x"))


def test_unknown_losses_leave_gaps() -> None:
    history = [
        {"epoch": epoch, "loss": None if epoch == 1 else 1.0, "soft": None} for epoch in range(4)
    ]
    assert charts.draw_losses(history, name="x").count("var(--after)") >= 1
    assert not charts.has_validation(history)


def test_settings_of_the_user_change_nothing(report: Report) -> None:
    rows = compare_targets(report)[0].rows
    expected = charts.draw_sizes(rows, name="x")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert charts.draw_sizes(rows, name="x") == expected


def test_one_tensor_and_one_layer_can_be_drawn() -> None:
    ranges = [{"low": 0.0, "high": 0.0, "clipped_low": 0.0, "clipped_high": 0.0}]
    assert "<svg" in charts.draw_ranges(ranges, name="x", label="ranges")
    assert "<svg" in charts.draw_widths({"conv": [8, 8]}, name="x")
    assert "<svg" in charts.draw_losses([{"epoch": 0, "loss": 1.0}], name="x")
    assert "<svg" in charts.draw_validation([{"epoch": 0, "validation": 90.0}], name="x")


def test_sensitivity_names_the_group_that_matters_most() -> None:
    curves = {"conv1": [[0.5, 0.1], [0.25, 0.3]], "layer1.conv1": [[0.5, 0.6]]}
    svg = charts.draw_sensitivity(curves, name="x")
    assert any("layer1.conv1 matters most" in text for text in texts(svg))
    lines = [e for e in ET.fromstring(svg).iter("path") if e.get("stroke") == "var(--after)"]
    assert len(lines) == 1


def test_the_errors_of_layers_are_bars_the_worst_first() -> None:
    errors = {f"layer{index}": 0.4 / (index + 1) for index in reversed(range(30))}
    svg = charts.draw_layer_errors(errors, name="x")
    shown = [text for text in texts(svg) if text.startswith("layer")]
    assert shown == [f"layer{index}" for index in range(20)]
    bars = [
        [float(x) for x in re.findall(r"[ML] ([\d.]+)", element.attrib["d"])]
        for element in ET.fromstring(svg).iter("path")
        if element.attrib.get("fill") == "var(--after)"
    ]
    lengths = [max(xs) - min(xs) for xs in bars]
    expected = [lengths[0] / (index + 1) for index in range(20)]
    assert lengths == pytest.approx(expected, abs=0.05)


def test_an_infinite_error_has_the_longest_bar() -> None:
    svg = charts.draw_layer_errors({"good": 0.1, "broken": float("inf")}, name="x")
    assert [text for text in texts(svg) if text != ""] == ["broken", "good", "inf", "0.1"]


def test_long_names_of_layers_keep_their_ends() -> None:
    svg = charts.draw_layer_errors({"model.encoder.layers.11.attention.output": 0.1}, name="x")
    assert texts(svg)[0] == "…ayers.11.attention.output"
