"""What is compared with what."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slimdown.core import Report
from slimdown.report.compare import compare_targets
from slimdown.report.summary import describe_run, summarize


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
