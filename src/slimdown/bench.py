"""Timing the deployed artifacts of a run, all of a target's interleaved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter
from torch import Tensor

from slimdown.core import Artifact, Budget, Measurement, Report, Target
from slimdown.errors import BadInput
from slimdown.files import hash_files
from slimdown.measure import (
    MeasureSettings,
    describe_environment,
    measure_latencies,
    measure_peak_memory,
)
from slimdown.plan import ORIGINAL
from slimdown.report import read_results, write_report
from slimdown.store import StepFolder
from slimdown.targets import find_target
from slimdown.verdict import judge


def bench_run(folder: Path | str, settings: MeasureSettings | None = None) -> Report:
    """Measure a run's deployed artifacts again, on this machine; scores stay those of the run.

    `settings` are the run's own where none are given. Judges the budget on the new figures and
    writes the new report into `folder/bench`; the run's own report is left as it was. Raises
    BadInput where an artifact is gone or is not the one that the run wrote.
    """
    folder = Path(folder)
    report = read_results(folder)
    settings = settings or TypeAdapter(MeasureSettings).validate_python(report.recipe["measure"])
    budget = TypeAdapter(Budget).validate_python(report.recipe["budget"])
    inputs = StepFolder(folder / ORIGINAL, key="").load_tensors("example")["input"]
    measurements: list[Measurement] = []
    for name in dict.fromkeys(m.runtime for m in report.measurements):
        rows = [m for m in report.measurements if m.runtime == name]
        if any(row.artifact for row in rows):
            rows = time_artifacts(
                find_target(name), rows, folder=folder, inputs=inputs, settings=settings
            )
        measurements += rows
    report = replace(report, environment=describe_environment(), measurements=tuple(measurements))
    report = replace(report, verdicts=judge(report, budget))
    write_report(report, folder / "bench")
    return report


def time_artifacts(
    target: Target,
    rows: Sequence[Measurement],
    *,
    folder: Path,
    inputs: Tensor,
    settings: MeasureSettings,
) -> list[Measurement]:
    """Add latency and peak memory to the measurements of one target's artifacts in `folder`."""
    artifacts = [row.artifact.under(folder) for row in rows if row.artifact is not None]
    assert len(artifacts) == len(rows), "every measurement of a target has an artifact"
    for artifact in artifacts:
        check_untouched(artifact)
    predicts = [target.load(each, num_threads=settings.num_threads) for each in artifacts]
    runtime = f"{target.name} {target.check()}"
    latencies = measure_latencies(predicts, inputs, settings, runtime=runtime)
    peaks = [
        measure_peak_memory(target.name, each, inputs, settings) if settings.memory else None
        for each in artifacts
    ]
    return [
        replace(row, latency=latency, peak_memory_bytes=peak)
        for row, latency, peak in zip(rows, latencies, peaks, strict=True)
    ]


def check_untouched(artifact: Artifact) -> None:
    """Raise BadInput unless an artifact's files are those that were judged."""
    missing = [file for file in artifact.files if not file.is_file()]
    if missing:
        raise BadInput(f"{missing[0]} is missing: run the recipe again to make it")
    if hash_files(artifact.files) != artifact.sha256:
        raise BadInput(
            f"{artifact.path} is not the file that the run wrote and judged (its hash differs): "
            "remove its folder and run the recipe again"
        )
