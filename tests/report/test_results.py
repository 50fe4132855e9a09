"""results.json holds the whole report, and what is not one is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from slimdown.core import Report
from slimdown.errors import BadInput
from slimdown.report import read_results, write_report


def test_what_is_read_equals_what_was_written(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "run")
    assert read_results(tmp_path / "run") == report
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert written == {"results.json", "report.html", "report.md"}


def test_pages_drawn_again_from_the_results_are_the_same(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "first")
    write_report(read_results(tmp_path / "first"), tmp_path / "second")
    for name in ("results.json", "report.html", "report.md"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_facts_that_are_no_numbers_are_kept_as_unknown(report: Report, tmp_path: Path) -> None:
    step = replace(report.steps[1], facts={"history": [{"epoch": 0, "loss": float("nan")}]})
    report = replace(report, steps=(report.steps[0], step, *report.steps[2:]))
    write_report(report, tmp_path)
    assert read_results(tmp_path).steps[1].facts["history"][0]["loss"] is None


def test_a_missing_report_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"results\.json does not exist: give the folder of a run"):
        read_results(tmp_path / "nothing")


def test_another_schema_version_is_refused(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    values = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps({**values, "schema_version": 2}))
    with pytest.raises(BadInput, match="schema_version 2 and this slimdown reads 1"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema_version": 1, "name": "cut o', "is not a report: the whole"),
        ("[]", "is not a report"),
        ("{}", "schema_version None"),
        ('{"schema_version": 1, "name": 3}', "is not a report: name"),
    ],
)
def test_a_corrupt_report_says_where(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(BadInput, match=message):
        read_results(tmp_path)
