"""The report on disk: results.json is the whole of it, the pages are drawn from it."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from slimdown.core import Report
from slimdown.errors import BadInput
from slimdown.files import write_bytes
from slimdown.report.html import render_html
from slimdown.report.markdown import render_markdown

SCHEMA_VERSION = 1
RESULTS = "results.json"

_REPORT = TypeAdapter(Report)


def write_report(report: Report, folder: Path) -> None:
    """Write results.json, report.html and report.md into `folder`, each whole or not at all."""
    write_bytes(folder / RESULTS, _REPORT.dump_json(report, indent=1) + b"\n")
    write_bytes(folder / "report.html", render_html(report).encode())
    write_bytes(folder / "report.md", render_markdown(report).encode())


def read_results(folder: Path) -> Report:
    """Read the report that `write_report` wrote. Raises BadInput if there is none that fits."""
    path = folder / RESULTS
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadInput(
            f"{path} does not exist: give the folder of a run that has ended, such as runs/demo"
        ) from error
    try:
        version = _schema_version(content)
        if version != SCHEMA_VERSION:
            raise BadInput(
                f"{path} has schema_version {version!r} and this slimdown reads {SCHEMA_VERSION}: "
                "run the recipe again, or use the version of slimdown that wrote it"
            )
        return _REPORT.validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(key) for key in first["loc"]) or "the whole"
        raise BadInput(
            f"{path} is not a report: {place}: {first['msg']}; run the recipe again to write it"
        ) from error


def _schema_version(content: bytes) -> object:
    try:
        values = json.loads(content)
    except ValueError:  # pydantic tells better where the JSON breaks
        return SCHEMA_VERSION
    return values.get("schema_version") if isinstance(values, dict) else SCHEMA_VERSION
