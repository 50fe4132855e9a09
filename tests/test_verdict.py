"""The budget is held against what was measured of the last artifact of each target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from slimdown.core import Accuracy, Artifact, Budget, Latency, Measurement, Report, Step, Verdict
from slimdown.verdict import judge


def measurement(
    step: str,
    runtime: str,
    *,
    change: float | None = 0.0,
    median_ms: float | None = 10.0,
    size_bytes: int | None = 1000,
) -> Measurement:
    accuracy = Accuracy(
        metric="top1", value=90.0, low=88.0, high=92.0, num_samples=1000, change=change
    )
    latency = None
    if median_ms is not None:
        latency = Latency(
            median_ms=median_ms,
            p90_ms=median_ms,
            samples_ms=(median_ms,),
            batch_size=1,
            num_threads=1,
            num_warmup=0,
            runtime=runtime,
        )
    path = Path(runtime, step)
    artifact = Artifact(
        target=runtime, path=path, files=(path,), sha256="", size_bytes=1, precision="int8"
    )
    return Measurement(
        step=step,
        runtime=runtime,
        accuracy=accuracy,
        latency=latency,
        size_bytes=size_bytes,
        artifact=None if runtime == "torch" else artifact,
    )


def report_of(*measurements: Measurement) -> Report:
    names = dict.fromkeys(each.step for each in measurements)
    steps = tuple(
        Step(
            name=name,
            kind="",
            parent=None,
            settings={},
            facts={},
            num_parameters=1,
            macs=1,
            seconds=0.0,
        )
        for name in names
    )
    return Report(name="", recipe={}, environment={}, steps=steps, measurements=measurements)


def run_with(last: Measurement) -> Report:
    """An original, a poor step between, and the `last` step, all on ONNX Runtime."""
    return report_of(
        measurement("00-original", "torch"),
        measurement("00-original", "onnxruntime"),
        measurement("01-prune", "onnxruntime", change=-50.0, median_ms=99.0, size_bytes=10**9),
        last,
    )


@pytest.mark.parametrize(
    ("budget", "found", "met"),
    [
        (Budget(max_drop=1.5), 1.5, True),
        (Budget(max_drop=1.4), 1.5, False),
        (Budget(min_speedup=2.5), 2.5, True),
        (Budget(min_speedup=2.6), 2.5, False),
        (Budget(max_size=200), 200, True),
        (Budget(max_size=199), 200, False),
    ],
)
def test_each_limit_is_held_against_the_last_step(budget: Budget, found: float, met: bool) -> None:
    last = measurement("02-quantize", "onnxruntime", change=-1.5, median_ms=4.0, size_bytes=200)
    (verdict,) = judge(run_with(last), budget)
    assert verdict.found == pytest.approx(found)
    assert verdict.met is met
    assert verdict.target == "onnxruntime"


@pytest.mark.parametrize("budget", [Budget(max_drop=1), Budget(min_speedup=1), Budget(max_size=1)])
def test_what_was_not_measured_is_not_met(budget: Budget) -> None:
    last = measurement("02-quantize", "onnxruntime", change=None, median_ms=None, size_bytes=None)
    (verdict,) = judge(run_with(last), budget)
    assert (verdict.found, verdict.met) == (None, False)


def test_every_target_is_judged_on_its_own_branch() -> None:
    report = report_of(
        measurement("00-original", "onnxruntime"),
        measurement("01-quantize-onnxruntime", "onnxruntime", change=-3.0),
        measurement("00-original", "openvino", median_ms=6.0),
        measurement("01-quantize-openvino", "openvino", change=-0.5, median_ms=3.0),
    )
    verdicts = judge(report, Budget(max_drop=1.0, min_speedup=2.0))
    found = {(each.target, each.limit): (each.found, each.met) for each in verdicts}
    assert found == {
        ("onnxruntime", "max_drop"): (3.0, False),
        ("onnxruntime", "min_speedup"): (1.0, False),
        ("openvino", "max_drop"): (0.5, True),
        ("openvino", "min_speedup"): (2.0, True),
    }


def test_rounding_breaks_no_budget_and_zero_has_no_sign() -> None:
    change = 87.3 - 88.0
    assert -change > 0.7, "the example needs a difference that rounding makes too large"
    drop = judge(run_with(measurement("02-q", "onnxruntime", change=change)), Budget(max_drop=0.7))
    assert drop[0].met
    none = judge(run_with(measurement("02-q", "onnxruntime")), Budget(max_drop=0.0))
    assert str(none[0].found) == "0.0"


def test_a_gain_is_a_negative_drop() -> None:
    (verdict,) = judge(
        run_with(measurement("02-q", "onnxruntime", change=0.7)), Budget(max_drop=0.0)
    )
    assert verdict == Verdict(
        target="onnxruntime", limit="max_drop", allowed=0.0, found=-0.7, met=True
    )


def test_no_limits_and_no_artifacts_give_no_verdicts() -> None:
    report = run_with(measurement("02-q", "onnxruntime"))
    assert judge(report, Budget()) == ()
    torch_only = replace(report, measurements=report.measurements[:1])
    assert judge(torch_only, Budget(max_drop=1.0)) == ()
