"""What is compared with what."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slimdown.core import Measurement, Report
from slimdown.report.compare import compare_targets
from slimdown.report.html import render_html
from slimdown.report.markdown import escape, render_markdown
from slimdown.report.summary import (
    describe_faster_float,
    describe_notes,
    describe_run,
    summarize,
)


def with_medians(report: Report, medians: dict[str, float | None]) -> Report:
    """The report as if ONNX Runtime had taken these milliseconds, None for not timed."""

    def change(measured: Measurement) -> Measurement:
        if measured.runtime != "onnxruntime" or measured.step not in medians:
            return measured
        median = medians[measured.step]
        assert measured.latency is not None
        latency = None if median is None else replace(measured.latency, median_ms=median)
        return replace(measured, latency=latency)

    return replace(report, measurements=tuple(map(change, report.measurements)))


def test_the_result_is_compared_within_its_own_runtime(report: Report) -> None:
    onnxruntime, openvino = compare_targets(report)
    assert [row.label for row in onnxruntime.rows] == [
        "Original", "1 Prune", "2 Distill", "3 Quantize",
    ]  # fmt: skip
    assert onnxruntime.after.shrinkage == pytest.approx(1_884_213 / 287_104)
    assert openvino.after.shrinkage == pytest.approx(1_921_448 / 301_990)
    assert openvino.version == "openvino 2026.4.1"
    before, after = onnxruntime.before.median_ms, onnxruntime.after.median_ms
    assert before is not None
    assert after is not None
    assert onnxruntime.after.speedup == pytest.approx(before / after)


def test_a_step_alone_is_held_against_its_parent(report: Report) -> None:
    rows = compare_targets(report)[1].rows
    assert rows[0].own_change is None
    assert [row.own_change for row in rows[1:]] == pytest.approx([-4.3, 3.5, -1.0])


def test_verdicts_stand_with_their_target(report: Report) -> None:
    onnxruntime, openvino = compare_targets(report)
    for limit, met in (("max_drop", False), ("min_speedup", True), ("max_size", False)):
        passed, found = onnxruntime.verdicts[limit], openvino.verdicts[limit]
        assert passed is not None
        assert passed.met
        assert found is not None
        assert found.met is met


def test_where_nothing_was_deployed_the_torch_modules_are_compared(report: Report) -> None:
    in_torch = tuple(m for m in report.measurements if m.runtime == "torch")
    (comparison,) = compare_targets(replace(report, measurements=in_torch, verdicts=()))
    assert comparison.runtime == "torch"
    lines = {line.subject: line.gain for line in summarize(comparison)}
    assert lines["size"] == lines["median latency"] == "not measured"
    assert lines["top1"].startswith("1.5 points lost")


def test_a_run_is_described_in_a_line(report: Report) -> None:
    assert describe_run(report) == [
        "prune → distill → quantize", "AMD EPYC 9655 96-Core Processor", "2026-11-24",
    ]  # fmt: skip
    assert describe_run(replace(report, environment={}, steps=report.steps[:1])) == []


FLOAT, INT8 = "02-distill", "03-quantize-onnxruntime"


@pytest.mark.parametrize(
    ("float_ms", "int8_ms", "is_told"),
    [(1.0, 0.9, False), (1.0, 1.0, True), (1.0, 1.5, True), (None, 1.5, False), (1.0, None, False)],
)
def test_the_float_file_is_offered_where_int8_is_not_faster(
    report: Report, float_ms: float | None, int8_ms: float | None, is_told: bool
) -> None:
    # The original and the pruned model are slower than either: they are not what is offered.
    slow = with_medians(report, {FLOAT: float_ms, INT8: int8_ms, "00-original": 9.0})
    onnxruntime, openvino = compare_targets(slow)
    assert openvino.faster_float is None  # 0.71 ms after 1.22 ms
    faster = onnxruntime.faster_float
    assert (faster is not None) == is_told
    assert faster is None or faster.step.name == FLOAT


def test_the_faster_file_is_named_on_every_page_and_silenced_by_the_recipe(report: Report) -> None:
    slow = with_medians(report, {FLOAT: 1.0, INT8: 1.5})
    said = describe_faster_float(compare_targets(slow)[0])
    assert said == (
        "INT8 is not faster here: 1.50 ms, and 1.00 ms in float after 2 Distill; "
        "the faster file: deploy/onnxruntime/02-distill/model.onnx"
    )
    assert said in render_html(slow)
    assert f"**{said}**" in render_markdown(slow)
    kept = replace(slow, recipe={**slow.recipe, "keep_slower": True})
    assert compare_targets(kept)[0].faster_float is None
    assert "not faster" not in render_html(kept) + render_markdown(kept)


def test_int8_that_was_trained_on_is_held_against_the_float_before_it(report: Report) -> None:
    """Quantize, then distill: two INT8 files in a row, and the float one before both."""
    slow = with_medians(report, {"01-prune": 1.0, FLOAT: 0.5, INT8: 1.5})
    rows = tuple(
        replace(m, artifact=m.artifact and replace(m.artifact, precision="int8"))
        if m.step == FLOAT
        else m
        for m in slow.measurements
    )
    faster = compare_targets(replace(slow, measurements=rows))[0].faster_float
    assert faster is not None
    assert faster.step.name == "01-prune"


def test_a_float_result_is_never_held_against_itself(report: Report) -> None:
    steps = tuple(m for m in report.measurements if not m.step.startswith("03-quantize"))
    assert all(c.faster_float is None for c in compare_targets(replace(report, measurements=steps)))


def with_facts(report: Report, **facts: object) -> Report:
    """The report as if each quantize step had told these facts, too."""
    steps = tuple(
        replace(step, facts={**step.facts, **facts}) if step.kind == "quantize" else step
        for step in report.steps
    )
    return replace(report, steps=steps)


def on_cpu(report: Report, *features: str, **environment: object) -> Report:
    told = {"architecture": "x86_64", "system": "Linux 6.8", "cpu_features": list(features)}
    return replace(report, environment={**report.environment, **told, **environment})


def test_a_cpu_without_vnni_is_told_of_where_8_bit_weights_run_on_it(report: Report) -> None:
    told = with_facts(report, weight_bits={"stem": 8, "layer1.0": 8, "head": 7})
    old = on_cpu(told, "avx2", "avx512f")
    (said,) = describe_notes(compare_targets(old)[0])
    assert "no VNNI" in said
    assert "in 2 layers (stem, layer1.0)" in said
    assert "quantize.weight_bits: 7" in said
    assert said in render_html(old)
    assert f"Note: {escape(said)}." in render_markdown(old)


@pytest.mark.parametrize(
    "other",
    [
        {"cpu_features": ["avx2", "avx512f", "avx512_vnni"]},
        {"cpu_features": ["avx2", "avx_vnni"]},
        {"cpu_features": ["neon"], "architecture": "aarch64"},
        {"cpu_features": ["avx2"], "system": "Windows 11"},  # which does not tell of VNNI
        {"cpu_features": None, "architecture": None, "system": None},
    ],
)
def test_other_cpus_are_not(report: Report, other: dict[str, object]) -> None:
    told = on_cpu(with_facts(report, weight_bits={"stem": 8}), "avx2", **other)
    assert describe_notes(compare_targets(told)[0]) == []


def test_nor_is_one_that_runs_float_or_7_bits(report: Report) -> None:
    narrow = on_cpu(with_facts(report, weight_bits={"stem": 7, "head": 4}), "avx2")
    assert describe_notes(compare_targets(narrow)[0]) == []
    steps = tuple(m for m in report.measurements if not m.step.startswith("03-quantize"))
    floats = replace(on_cpu(report, "avx2"), measurements=steps)
    assert all(describe_notes(each) == [] for each in compare_targets(floats))


def test_what_stages_noted_is_told_once(report: Report) -> None:
    noted = with_facts(report, notes=["layer1.0: most values become zero"] * 2)
    assert describe_notes(compare_targets(noted)[0]) == ["layer1.0: most values become zero"]
    assert "layer1.0: most values become zero" in render_html(noted)
