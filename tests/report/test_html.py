"""The page is whole, safe, small, and says nothing that was not measured."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from pydantic import TypeAdapter

from slimdown.core import Measurement, Report
from slimdown.report.html import render_html

VOID = {"meta", "br"}
EVIL = """"'><script>alert(1)</script><img src=x onerror=alert(1)>]]>{{ 7*7 }}$x_1$"""
KEPT_KEYS = {"runtime", "target", "limit", "step", "precision", "verified", "kind", "operator"}


class Page(HTMLParser):
    """The elements of a page, and whether they were closed as they were opened."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.styles: list[str] = []
        self.text = ""
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles.append(data)
        else:
            self.text += data

    def values(self, attribute: str) -> list[str]:
        return [v for _, attrs in self.elements if (v := attrs.get(attribute)) is not None]


def map_strings(value: Any, change: Callable[[str], str], key: str = "") -> Any:
    """Change every string of a JSON value, keys of free-form mappings included."""
    if isinstance(value, str):
        return value if key in KEPT_KEYS else change(value)
    if isinstance(value, list):
        return [map_strings(each, change, key) for each in value]
    if isinstance(value, dict):
        return {
            change(name) if key in {"widths", "frozen", "kept_float", "environment"} else name:
            map_strings(each, change, name)
            for name, each in value.items()
        }  # fmt: skip
    return value


def evil_report(report: Report) -> Report:
    adapter = TypeAdapter(Report)
    values = map_strings(adapter.dump_python(report, mode="json"), lambda text: text + EVIL)
    for step in values["steps"]:
        step["kind"] += EVIL
    for each in values["measurements"]:
        each["step"] += EVIL  # as the steps' own names
        if each["runtime"] == "openvino":
            each["runtime"] += EVIL
    return adapter.validate_python(values)


def test_the_page_is_well_formed(report: Report) -> None:
    page = Page(render_html(report))
    assert page.open == []
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {link.removeprefix("#") for link in page.values("href")} <= set(ids)


def test_nothing_comes_from_outside_and_nothing_runs(report: Report) -> None:
    content = render_html(report)
    assert "http:" not in content
    assert "https:" not in content
    page = Page(content)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert all(link.startswith("#") for link in page.values("href"))
    assert page.values("src") == []
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", content))


def test_the_policy_allows_the_one_style_sheet_only(report: Report) -> None:
    page = Page(render_html(report))
    (policy,) = (
        attrs["content"]
        for tag, attrs in page.elements
        if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    (style,) = page.styles
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy is not None
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}';")
    assert "unsafe" not in policy
    assert page.values("style") == [], "a style attribute would be blocked"


def test_names_are_text_wherever_they_stand(report: Report) -> None:
    content = render_html(evil_report(report))
    page = Page(content)
    assert page.open == []
    tags = {tag for tag, _ in page.elements}
    assert "script" not in tags
    assert "img" not in tags
    attributes = {name for _, attrs in page.elements for name in attrs}
    assert not [name for name in attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") > 100
    assert "{{ 7*7 }}" in page.text


def test_figures_of_the_report_are_on_the_page(report: Report) -> None:
    text = Page(render_html(report)).text
    for expected in (
        "cifar10-resnet32",
        "Budget not met",
        "6.6×",  # noqa: RUF001
        "1.8 is over the 1.5 points allowed",
        "layer3.4.conv2",
        "30 of 31",
        "AMD EPYC 9655",
        "max_size: 300000",
        "9f2c9f2c",
    ):
        assert expected in text


def bare(measurement: Measurement) -> Measurement:
    return Measurement(
        step=measurement.step, runtime=measurement.runtime, artifact=measurement.artifact
    )


def test_what_was_not_measured_is_never_a_zero(report: Report) -> None:
    steps = tuple(replace(step, facts={}) for step in report.steps)
    measurements = tuple(map(bare, report.measurements))
    verdicts = tuple(replace(verdict, found=None, met=False) for verdict in report.verdicts)
    report = replace(report, steps=steps, measurements=measurements, verdicts=verdicts)
    text = Page(render_html(report)).text
    assert text.count("not measured") > 20
    assert "0.0" not in text.replace("0.0 s", "").replace("macs: 0.5", "")
    assert "0 B" not in text


@pytest.mark.parametrize("fact", ["widths", "history", "ranges", "kept_float", "frozen", "alpha"])
def test_every_fact_is_optional(report: Report, fact: str) -> None:
    steps = tuple(
        replace(step, facts={key: value for key, value in step.facts.items() if key != fact})
        for step in report.steps
    )
    assert Page(render_html(replace(report, steps=steps))).open == []


def test_latency_and_compensation_are_told(report: Report) -> None:
    facts = {
        "latency": {"runtime": "onnxruntime 1.0", "asked": 0.5, "measured": 0.512},
        "compensation": {"output_error": [0.8, 0.1]},
    }
    steps = (report.steps[0], replace(report.steps[1], facts=facts), *report.steps[2:])
    page = render_html(replace(report, steps=steps))
    assert "asked 50" in page
    assert "measured 51" in page
    assert "0.8 → 0.1 compensated" in page


def test_zeros_and_removed_blocks_are_told(report: Report) -> None:
    facts = {
        "depth": {"removed": ["layer1.1", EVIL]},
        "zeros": 0.498,
        "compressed_bytes": [1_000_000, 600_000],
        "runtimes": {"onnxruntime": "no faster"},
    }
    before = Page(render_html(report)).text
    step = replace(report.steps[1], facts={**report.steps[1].facts, **facts})
    page = Page(render_html(replace(report, steps=(report.steps[0], step, *report.steps[2:]))))
    for told in ("layer1.1, ", EVIL, "49.8 %", "1.00 MB → 600 kB", "no faster"):
        assert told in page.text
        assert told not in before
    assert not page.open
    nothing = replace(step, facts={"depth": {"removed": []}})
    page = Page(render_html(replace(report, steps=(report.steps[0], nothing, *report.steps[2:]))))
    assert "none" in page.text


def test_a_run_without_targets_or_stages_has_a_page(report: Report) -> None:
    first = tuple(m for m in report.measurements if m.step == "00-original")
    in_torch = tuple(m for m in first if m.runtime == "torch")
    for measurements in (first, in_torch, ()):
        small = replace(report, steps=report.steps[:1], measurements=measurements, verdicts=())
        page = Page(render_html(small))
        assert page.open == []
        assert "Budget" not in page.text


def test_a_deep_network_keeps_the_page_small(report: Report) -> None:
    names = [f"features.{index}.block.conv" for index in range(300)]
    ranges = [
        {"layer": name, "kind": kind, "low": -1.23456, "high": 2.34567,
         "clipped_low": -1.0, "clipped_high": 2.0}
        for name in names
        for kind in ("weight", "activation")
    ]  # fmt: skip
    facts = {
        "prune": {"widths": {name: [512, 256] for name in names}},
        "quantize": {"ranges": ranges},
    }
    steps = tuple(
        replace(step, facts={**step.facts, **facts.get(step.kind, {})}) for step in report.steps
    )
    assert len(render_html(report)) < 150_000
    assert len(render_html(replace(report, steps=steps))) < 500_000


def test_errors_of_layers_are_drawn_where_they_were_measured(report: Report) -> None:
    assert "one layer alone quantized" not in render_html(report)
    errors = {f"conv{index}": 0.1 for index in range(25)}
    steps = tuple(
        replace(step, facts={**step.facts, "layer_errors": errors})
        if step.kind == "quantize"
        else step
        for step in report.steps
    )
    page = render_html(replace(report, steps=steps))
    assert page.count("one layer alone quantized: the worst 20 of 25") == 2


def test_the_same_report_gives_the_same_page(report: Report) -> None:
    assert render_html(report) == render_html(report)


def test_the_audit_of_an_int8_artifact_is_a_table(report: Report) -> None:
    page = render_html(report)
    assert page.count("INT8 kernels: 31 of 32 layers") == 2  # one for each target
    row = '<td><code>linear</code></td><td>matmul</td><td>float32</td><td class="text">excluded'
    assert page.count(row) == 2
    artifacts = [m.artifact and replace(m.artifact, audit=()) for m in report.measurements]
    measurements = tuple(map(lambda m, a: replace(m, artifact=a), report.measurements, artifacts))
    assert "INT8 kernels" not in render_html(replace(report, measurements=measurements))
