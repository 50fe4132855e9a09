"""What a report says about each target: its steps in a row, and the last against the first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slimdown.core import Measurement, Report, Step, Verdict
from slimdown.measure import saturates_int8


@dataclass(frozen=True, kw_only=True)
class Row:
    """One step as it was measured in one runtime."""

    step: Step
    label: str
    measured: Measurement
    own_change: float | None
    """Points that this step alone cost (negative) or gained, against the step before it."""
    speedup: float | None
    """How many times as fast as the first row, by the median."""
    shrinkage: float | None
    """How many times as small as the first row, by the file."""

    @property
    def score(self) -> float | None:
        return None if self.measured.accuracy is None else self.measured.accuracy.value

    @property
    def change(self) -> float | None:
        """Points against the model that the user brought."""
        return _change(self.measured)

    @property
    def median_ms(self) -> float | None:
        return _median(self.measured)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The user's own model and the result, in one runtime; ratios say how many times better."""

    runtime: str
    """The name of a target, or "torch" where nothing was deployed."""
    version: str
    """Name and version of the runtime where it is known."""
    rows: tuple[Row, ...]
    verdicts: Mapping[str, Verdict | None]
    """By limit; None where the budget sets no such limit."""
    keeps_slower: bool = False
    """Whether the recipe takes an INT8 artifact also where it is slower."""
    saturates: bool = False
    """Whether the CPU adds INT8 products in 16 bits: `measure.saturates_int8`."""

    @property
    def before(self) -> Row:
        return self.rows[0]

    @property
    def after(self) -> Row:
        return self.rows[-1]

    @property
    def faster_float(self) -> Row | None:
        """The float artifact before the INT8 one that ends the run, where INT8 is not faster.

        None where it is, where either was not timed, and where the recipe takes the slower one.
        """
        floats = [row for row in self.rows if not _is_int8(row)]
        if self.keeps_slower or not floats or not _is_int8(self.after):
            return None
        before, after = floats[-1].median_ms, self.after.median_ms
        return None if before is None or after is None or after < before else floats[-1]

    @property
    def saturating_layers(self) -> list[str]:
        """The layers of the result whose sums this CPU may saturate: weights of 8 bits."""
        if not self.saturates or not _is_int8(self.after):
            return []
        quantized = [row.step.facts for row in self.rows if row.step.kind == "quantize"]
        bits = quantized[-1].get("weight_bits", {}) if quantized else {}
        return [layer for layer, count in bits.items() if count > 7]

    @property
    def notes(self) -> list[str]:
        """What stages had to say beside their figures, each once, and not the data."""
        steps = [row.step for row in self.rows if row.step.parent is not None]
        return list(dict.fromkeys(note for step in steps for note in step.facts.get("notes", ())))

    @property
    def metric(self) -> str:
        scores = [row.measured.accuracy for row in self.rows]
        return next((score.metric for score in scores if score is not None), "accuracy")


def compare_targets(report: Report) -> tuple[Comparison, ...]:
    """One comparison a target; one of the torch modules where nothing was deployed."""
    runtimes = deployed_targets(report) or list(
        dict.fromkeys(m.runtime for m in report.measurements)
    )
    return tuple(_compare(report, runtime) for runtime in runtimes)


def deployed_targets(report: Report) -> list[str]:
    """The targets that artifacts were made for, in order."""
    return list(dict.fromkeys(m.runtime for m in report.measurements if m.artifact is not None))


def label_step(step: Step) -> str:
    """How a step is called: "Original", "1 Prune"."""
    index = step.name.split("-")[0].lstrip("0")
    kind = step.kind.capitalize()
    return f"{index} {kind}" if index.isdigit() else kind


def _compare(report: Report, runtime: str) -> Comparison:
    measured = [m for m in report.measurements if m.runtime == runtime]
    rows = tuple(_row(report, each, measured[0]) for each in measured)
    verdicts = {v.limit: v for v in report.verdicts if v.target == runtime}
    versions = [m.latency.runtime for m in measured if m.latency is not None]
    return Comparison(
        runtime=runtime,
        version=versions[0] if versions else runtime,
        rows=rows,
        verdicts={limit: verdicts.get(limit) for limit in ("max_drop", "min_speedup", "max_size")},
        keeps_slower=bool(report.recipe.get("keep_slower")),
        saturates=saturates_int8(report.environment),
    )


def _row(report: Report, measured: Measurement, first: Measurement) -> Row:
    step = report.step(measured.step)
    parent = None if step.parent is None else report.measurement(step.parent, measured.runtime)
    return Row(
        step=step,
        label=label_step(step),
        measured=measured,
        own_change=_difference(_change(measured), _change(parent)),
        speedup=_ratio(_median(first), _median(measured)),
        shrinkage=_ratio(first.size_bytes, measured.size_bytes),
    )


def _is_int8(row: Row) -> bool:
    artifact = row.measured.artifact
    return artifact is not None and artifact.precision == "int8"


def _change(measured: Measurement | None) -> float | None:
    if measured is None or measured.accuracy is None:
        return None
    return measured.accuracy.change


def _median(measured: Measurement) -> float | None:
    return None if measured.latency is None else measured.latency.median_ms


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


def _ratio(before: float | None, after: float | None) -> float | None:
    return before / after if before and after else None
