"""One self-contained page: no scripts, no outside addresses, and a policy that allows neither."""

from __future__ import annotations

import base64
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from slimdown.core import Json, Report, Step
from slimdown.report import charts, formats
from slimdown.report.compare import Comparison, compare_targets, deployed_targets, label_step
from slimdown.report.summary import (
    describe_audit,
    describe_conditions,
    describe_faster_float,
    describe_notes,
    describe_run,
)

_VERIFIED = {
    "executed": "running it here",
    "simulated": "simulating it",
    "compiled": "compiling it",
    "exported": "nothing: exported only",
}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """An inline SVG under a heading; `keys` explain its colors: ("before", "original")."""

    title: str
    svg: Markup
    keys: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class StepStory:
    """One stage of the run as the page tells of it."""

    step: Step
    label: str
    only_for: tuple[str, ...]
    """The targets that this step was made for; empty where it was made for all."""
    charts: tuple[Chart, ...]

    @property
    def facts(self) -> Mapping[str, Any]:
        """The step's facts; None for every one that it does not have."""
        return defaultdict(lambda: None, self.step.facts)


def render_html(report: Report) -> str:
    """Draw the whole report as one page."""
    comparisons = compare_targets(report)
    style = _read_template("report.css")
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            comparisons=comparisons,
            effects={c.runtime: _draw_effects(c) for c in comparisons},
            latencies={c.runtime: _draw_latencies(c) for c in comparisons},
            stories=[_tell_step(report, step) for step in report.steps if step.parent is not None],
            recipe=yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True, width=88),
            environment=list(formats.describe_pairs(report.environment)),
            style=Markup(style),
            policy=content_security_policy(style),
            subtitle=describe_run(report),
        )
    )


def content_security_policy(style: str) -> str:
    """Allow nothing but this one style sheet, known by its hash."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _draw_effects(comparison: Comparison) -> list[Chart]:
    """What each step did to accuracy, size and latency, where they were measured."""
    rows, name = comparison.rows, _name(comparison.runtime)
    drawn = []
    if any(row.score is not None for row in rows):
        svg = charts.draw_accuracies(rows, name=f"accuracy-{name}")
        drawn.append(_chart("Accuracy, with its 95 % interval", svg))
    if any(row.measured.size_bytes for row in rows):
        drawn.append(_chart("File size", charts.draw_sizes(rows, name=f"size-{name}")))
    if any(row.median_ms is not None for row in rows):
        drawn.append(_chart("Median latency", charts.draw_medians(rows, name=f"median-{name}")))
    return drawn


def _draw_latencies(comparison: Comparison) -> Chart | None:
    if all(row.median_ms is None for row in comparison.rows):
        return None
    name = f"latencies-{_name(comparison.runtime)}"
    svg = charts.draw_latencies(comparison.rows, name=name)
    return _chart("Distribution of timed calls, median marked", svg)


def _tell_step(report: Report, step: Step) -> StepStory:
    targets = deployed_targets(report)
    mine = [name for name in targets if report.measurement(step.name, name) is not None]
    return StepStory(
        step=step,
        label=label_step(step),
        only_for=() if mine == targets else tuple(mine),
        charts=tuple(_draw_facts(step.facts, _name(step.name))),
    )


def _draw_facts(facts: Json, name: str) -> Iterator[Chart]:
    """The charts that a step's facts give rise to; every fact is optional."""
    if widths := facts.get("widths"):
        svg = charts.draw_widths(widths, name=f"widths-{name}")
        yield _chart("Channels of each layer", svg, before="before", after="after")
    if sensitivity := facts.get("sensitivity"):
        svg = charts.draw_sensitivity(sensitivity, name=f"sensitivity-{name}")
        title = "Error of the output when one group alone is pruned"
        yield _chart(title, svg, muted="a group of channels", after="the one that matters most")
    if errors := facts.get("layer_errors"):
        svg = charts.draw_layer_errors(errors, name=f"layer-errors-{name}")
        shown, count = min(len(errors), charts.MOST_LAYERS), len(errors)
        title = f"Error of the output with one layer alone quantized: the worst {shown} of {count}"
        yield _chart(title, svg)
    if history := facts.get("history"):
        svg = charts.draw_losses(history, name=f"loss-{name}")
        yield _chart("Training loss", svg, after="loss", muted="soft term", dashed="hard term")
        if charts.has_validation(history):
            svg = charts.draw_validation(history, name=f"validation-{name}")
            yield _chart("Held-out training data", svg, after="score")
    for kind, title in (("weight", "Weight ranges"), ("activation", "Activation ranges")):
        if ranges := [each for each in facts.get("ranges") or [] if each["kind"] == kind]:
            svg = charts.draw_ranges(ranges, name=f"{kind}-{name}", label=title)
            yield _chart(title, svg, before="values seen", limit="what the scale can represent")


def _chart(title: str, svg: str, **keys: str) -> Chart:
    return Chart(title=title, svg=Markup(svg), keys=tuple(keys.items()))


def _name(text: str) -> str:
    """A name that may stand in an id: what a user called a step may hold anything."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("slimdown.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": formats.format_bytes,
        "count": formats.format_count,
        "ms": formats.format_ms,
        "ratio": formats.format_ratio,
        "points": formats.format_points,
        "percent": formats.format_percent,
        "value": formats.format_value,
        "number": formats.format_number,
        "range": formats.format_range,
        "seconds": formats.format_seconds,
        "interval": formats.format_interval,
        "change_interval": formats.format_change_interval,
        "split_drop": formats.split_drop,
        "verdict": formats.describe_verdict,
        "verified": _VERIFIED.__getitem__,
        "conditions": describe_conditions,
        "audit": describe_audit,
        "faster_float": describe_faster_float,
        "notes": describe_notes,
    }
    return environment


def _read_template(name: str) -> str:
    return (files("slimdown.report") / "templates" / name).read_text(encoding="utf-8")
