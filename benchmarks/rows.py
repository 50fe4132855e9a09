"""The CSV files of benchmarks: a row is a run that is not made again."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows of a file, all values as text; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, columns: Sequence[str], row: Row) -> None:
    """Add a row, below a head where the file is new."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def fill(
    path: Path, columns: Sequence[str], cases: Iterable[tuple[Row, Callable[[], Row]]]
) -> None:
    """Make and print the rows that are missing: of each its name, and what makes its figures."""
    done = read(path)
    for name, make in cases:
        if any(all(str(value) == row[key] for key, value in name.items()) for row in done):
            continue
        row = name | make()
        append(path, columns, row)
        print(*(f"{key}={row[key]}" for key in columns if key in row), flush=True)
