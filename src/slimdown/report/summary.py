"""The before/after of a target in a few lines of words: what the terminal and Markdown show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slimdown.core import Accuracy, Report, Verdict
from slimdown.report.compare import Comparison, Row, label_step
from slimdown.report.formats import (
    NOT_MEASURED,
    describe_gain,
    format_bytes,
    format_change_interval,
    format_count,
    format_interval,
    format_ms,
    format_value,
    split_drop,
)

Limit = Literal["max_drop", "min_speedup", "max_size"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One property of the original and of the result, what became of it, and its verdict."""

    subject: str
    before: str
    after: str
    gain: str
    verdict: Verdict | None = None


def summarize(comparison: Comparison) -> tuple[Line, ...]:
    """Accuracy, size, latency, MACs, parameters and memory, in this order."""
    first, last = comparison.before, comparison.after
    sizes = first.measured.size_bytes, last.measured.size_bytes
    peaks = first.measured.peak_memory_bytes, last.measured.peak_memory_bytes
    return (
        Line(
            subject=comparison.metric,
            before=_score(first),
            after=_score(last),
            gain=_describe_change(last.measured.accuracy),
            verdict=comparison.verdicts["max_drop"],
        ),
        Line(
            subject="size",
            before=format_bytes(sizes[0]),
            after=format_bytes(sizes[1]),
            gain=describe_gain(*sizes, "smaller", "larger"),
            verdict=comparison.verdicts["max_size"],
        ),
        Line(
            subject="median latency",
            before=format_ms(first.median_ms),
            after=format_ms(last.median_ms),
            gain=describe_gain(first.median_ms, last.median_ms, "faster", "slower"),
            verdict=comparison.verdicts["min_speedup"],
        ),
        Line(
            subject="MACs",
            before=format_count(first.step.macs),
            after=format_count(last.step.macs),
            gain=describe_gain(first.step.macs, last.step.macs, "fewer", "more"),
        ),
        Line(
            subject="parameters",
            before=format_count(first.step.num_parameters),
            after=format_count(last.step.num_parameters),
            gain=describe_gain(
                first.step.num_parameters, last.step.num_parameters, "fewer", "more"
            ),
        ),
        Line(
            subject="peak memory",
            before=format_bytes(peaks[0]),
            after=format_bytes(peaks[1]),
            gain=describe_gain(*peaks, "less", "more"),
        ),
    )


def describe_run(report: Report) -> list[str]:
    """What was done, where and when: ["prune → quantize", "AMD EPYC 9655", "2026-11-24"]."""
    # Targets that share a stage have a step each for it, of one label.
    kinds = {label_step(step): step.kind for step in report.steps if step.parent is not None}
    said = [" → ".join(kinds.values())] if kinds else []
    for key, length in (("cpu", None), ("date", 10)):
        if isinstance(value := report.environment.get(key), str):
            said.append(value[:length])
    return said


def describe_conditions(comparison: Comparison) -> str:
    """In which runtime and how the original and the result were compared."""
    if comparison.after.measured.artifact is None:
        return "The torch modules; nothing was deployed."
    said = f"The model that was brought and the result, both on {comparison.version}"
    latency = comparison.after.measured.latency
    if latency is None:
        return said + "; not timed."
    threads = "1 thread" if latency.num_threads == 1 else f"{latency.num_threads} threads"
    return f"{said}, timed in turns: batch {latency.batch_size}, {threads}."


def describe_audit(row: Row) -> str | None:
    """How many layers run in INT8: "INT8 kernels: 52 of 54 layers"; None for a float artifact."""
    artifact = row.measured.artifact
    if artifact is None or not artifact.audit:
        return None
    num_int8 = sum(layer.precision == "int8" for layer in artifact.audit)
    return f"INT8 kernels: {num_int8} of {len(artifact.audit)} layers"


def describe_faster_float(comparison: Comparison) -> str | None:
    """That INT8 is not faster, and which file is; None where it is faster, or kept all the same."""
    faster = comparison.faster_float
    if faster is None or faster.measured.artifact is None:
        return None
    return (
        f"INT8 is not faster here: {format_ms(comparison.after.median_ms)}, and "
        f"{format_ms(faster.median_ms)} in float after {faster.label}; "
        f"the faster file: {faster.measured.artifact.path.as_posix()}"
    )


def describe_notes(comparison: Comparison) -> list[str]:
    """What there is to know about the result that no figure tells."""
    layers = comparison.saturating_layers
    if not layers:
        return comparison.notes
    named = ", ".join(layers[:3]) + (", …" if len(layers) > 3 else "")
    saturation = (
        f"this CPU has no VNNI: INT8 kernels add products in 16 bits, which 8-bit weights can "
        f"exceed in {len(layers)} layers ({named}); where accuracy drops, quantize.weight_bits: 7 "
        "rules it out, at the same speed"
    )
    return [saturation, *comparison.notes]


def _score(row: Row) -> str:
    if row.score is None:
        return NOT_MEASURED
    return f"{format_value(row.score)} ({format_interval(row.measured.accuracy)})"


def _describe_change(accuracy: Accuracy | None) -> str:
    if accuracy is None or accuracy.change is None:
        return NOT_MEASURED
    interval = format_change_interval(accuracy)
    shown = " ".join(split_drop(accuracy.change))
    return shown if interval == NOT_MEASURED else f"{shown} ({interval})"
