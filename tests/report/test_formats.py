"""How figures are written."""

# ruff: noqa: RUF001 - the signs are those of typography, and meant

from __future__ import annotations

from collections.abc import Callable

import pytest

from slimdown.core import Verdict
from slimdown.report import formats


@pytest.mark.parametrize(
    ("write", "value", "expected"),
    [
        (formats.format_bytes, 0, "0 B"),
        (formats.format_bytes, 999, "999 B"),
        (formats.format_bytes, 1000, "1.00 kB"),
        (formats.format_bytes, 287_104, "287 kB"),
        (formats.format_bytes, 999_700, "1.00 MB"),
        (formats.format_bytes, 178_000_000, "178 MB"),
        (formats.format_bytes, 3e15, "3000 TB"),
        (formats.format_count, 10, "10"),
        (formats.format_count, 25_557_032, "25.6 M"),
        (formats.format_ms, 0.05714, "0.057 ms"),
        (formats.format_ms, 9.996, "10.0 ms"),
        (formats.format_ms, 1234.5, "1234 ms"),
        (formats.format_ratio, 7.42, "7.4×"),
        (formats.format_ratio, 0.984, "0.98×"),
        (formats.format_ratio, 151.4, "151×"),
        (formats.format_points, -1.25, "−1.2"),
        (formats.format_points, 0.3, "+0.3"),
        (formats.format_points, -0.04, "0.0"),
        (formats.format_percent, 99.25, "99.2 %"),
        (formats.format_value, 91.5, "91.5"),
        (formats.format_seconds, 0.44, "0.4 s"),
        (formats.format_seconds, 59.7, "1 min 00 s"),
        (formats.format_seconds, 3700, "1 h 01 min"),
        (formats.format_number, 3.1e-7, "3.1e−7"),
        (formats.format_number, -1.84219, "−1.842"),
    ],
)
def test_figures_are_written_for_people(
    write: Callable[[float | None], str], value: float, expected: str
) -> None:
    assert write(value) == expected
    assert write(None) == "not measured"


@pytest.mark.parametrize(
    ("limit", "allowed", "found", "expected"),
    [
        ("max_drop", 1.5, 0.9, "within the 1.5 points allowed"),
        ("max_drop", 1.5, 1.8, "1.8 is over the 1.5 points allowed"),
        ("max_drop", 1.5, 1.52, "1.52 is over the 1.50 points allowed"),
        ("max_drop", 1.5, None, "not measured, 1.5 points allowed"),
        ("min_speedup", 2.0, 3.9, "reaches the 2.0× asked for"),
        ("min_speedup", 2.0, 1.997, "1.997× is short of the 2.000× asked for"),
        ("max_size", 300_000, 287_104, "within the 300 kB allowed"),
        ("max_size", 300_000, 300_001, "300,001 B is over the 300,000 B allowed"),
    ],
)
def test_verdicts_show_why(limit: str, allowed: float, found: float | None, expected: str) -> None:
    met = found is not None and (found >= allowed if limit == "min_speedup" else found <= allowed)
    verdict = Verdict(target="x", limit=limit, allowed=allowed, found=found, met=met)  # type: ignore[arg-type]
    assert formats.describe_verdict(verdict) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (-0.9, ("0.9", "points lost")),
        (-1.0, ("1.0", "point lost")),
        (0.34, ("0.3", "points gained")),
        (-0.02, ("0.0", "points changed")),
    ],
)
def test_changes_are_lost_or_gained(change: float, expected: tuple[str, str]) -> None:
    assert formats.split_drop(change) == expected


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (10.0, 2.0, "5.0× smaller"),
        (10.0, 12.0, "1.20× larger"),
        (None, 2.0, "not measured"),
        (10.0, None, "not measured"),
    ],
)
def test_gains_name_their_direction(
    before: float | None, after: float | None, expected: str
) -> None:
    assert formats.describe_gain(before, after, "smaller", "larger") == expected


def test_ranges_keep_their_zeros() -> None:
    assert formats.format_range(-1.1, 10.2) == "−1.10 … 10.2"
    assert formats.format_range(0.0, 127.0) == "0 … 127"


def test_nested_json_becomes_pairs_of_words() -> None:
    values = {
        "usable_cores": 2,
        "memory_bytes": 2e9,
        "gpu": None,
        "packages": {"torch": "2.14", "openvino": None},
        "cpu_features": ["avx2", "avx512f"],
    }
    assert list(formats.describe_pairs(values)) == [
        ("usable cores", "2"),
        ("memory", "2.00 GB"),
        ("gpu", "none"),
        ("torch", "2.14"),
        ("openvino", "none"),
        ("cpu features", "avx2, avx512f"),
    ]
