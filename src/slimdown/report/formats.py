"""How figures are written, the same on every page; None is always "not measured"."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from slimdown.core import Accuracy, Verdict

NOT_MEASURED = "not measured"
MINUS, TIMES, DASH = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"


def format_bytes(size_bytes: float | None) -> str:
    """Decimal units, as disks and downloads are sold: 1.06 MB."""
    return _scaled(size_bytes, ("B", "kB", "MB", "GB", "TB"))


def format_count(count: float | None) -> str:
    """Parameters or MACs: 269 k, 25.6 M, 4.09 G."""
    return _scaled(count, ("", "k", "M", "G", "T"))


def format_ms(milliseconds: float | None) -> str:
    """Three significant digits: 0.571 ms, 12.3 ms."""
    return _written(milliseconds, lambda value: f"{_significant(value)} ms")


def format_ratio(ratio: float | None) -> str:
    """How many times: 7.4×, 0.98×; two decimals near one, where they tell more from less."""
    if ratio is None:
        return NOT_MEASURED
    digits = 0 if ratio >= 100 else 1 if ratio >= 2 else 2
    return f"{ratio:.{digits}f}{TIMES}"


def format_points(points: float | None) -> str:
    """A change with its sign: +0.3, −1.2, 0.0."""
    if points is None:
        return NOT_MEASURED
    shown = f"{abs(points):.1f}"
    if shown == "0.0":
        return shown
    return ("+" if points > 0 else MINUS) + shown


def format_percent(percent: float | None) -> str:
    """One decimal: 91.5 %."""
    return _written(percent, lambda value: f"{value:.1f} %")


def format_value(value: float | None) -> str:
    """A score in its own points: 91.5."""
    return _written(value, lambda number: f"{number:.1f}")


def format_interval(accuracy: Accuracy | None) -> str:
    """The 95 % interval of a score: 89.6 – 93.1."""
    if accuracy is None or accuracy.low is None or accuracy.high is None:
        return NOT_MEASURED
    return f"{accuracy.low:.1f} {DASH} {accuracy.high:.1f}"


def format_change_interval(accuracy: Accuracy | None) -> str:
    """The 95 % interval of a score's change: −1.9 … +0.1."""
    if accuracy is None or accuracy.change_low is None or accuracy.change_high is None:
        return NOT_MEASURED
    return f"{format_points(accuracy.change_low)} … {format_points(accuracy.change_high)}"


def format_seconds(seconds: float | None) -> str:
    """0.4 s, 38 s, 2 min 05 s, 1 h 12 min."""
    if seconds is None:
        return NOT_MEASURED
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_number(number: float | None) -> str:
    """A value of no unit, four significant digits: 0.03125, 6, −1.842."""
    return _written(number, lambda value: f"{value:.4g}".replace("e-0", "e-").replace("-", MINUS))


def format_range(low: float, high: float) -> str:
    """Two values of no unit, three significant digits each: −1.18 … 10.2."""
    return f"{_plain(low)} … {_plain(high)}"


def describe_verdict(verdict: Verdict) -> str:
    """How a limit was kept or broken: "within the 1.5 points allowed", "1.8× is short of …".

    Told as exactly as it takes to see why a limit was not met.
    """
    if verdict.limit == "max_drop":
        found, allowed = _apart(verdict, lambda value, digits: f"{value:.{digits}f}")
        return _judged(verdict, found, f"{allowed} points allowed")
    if verdict.limit == "min_speedup":
        found, allowed = _apart(verdict, lambda value, digits: f"{value:.{digits}f}{TIMES}")
        return _judged(verdict, found, f"{allowed} asked for")
    found, allowed = _apart(
        verdict, lambda value, digits: f"{value:,.0f} B" if digits > 1 else format_bytes(value)
    )
    return _judged(verdict, found, f"{allowed} allowed")


def split_drop(change: float) -> tuple[str, str]:
    """A change of a score as a figure and a word: ("0.9", "points lost")."""
    shown = f"{abs(change):.1f}"
    if shown == "0.0":
        return shown, "points changed"
    unit = "point" if shown == "1.0" else "points"
    return shown, f"{unit} {'gained' if change > 0 else 'lost'}"


def describe_gain(before: float | None, after: float | None, better: str, worse: str) -> str:
    """How many times less `after` is, in words: "6.6× smaller", "1.20× slower"."""
    if not before or not after:
        return NOT_MEASURED
    ratio = format_ratio(max(before, after) / min(before, after))
    return f"{ratio} {worse if after > before else better}"


def describe_pairs(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Nested JSON as pairs of words, for tables: ("Usable cores", "2")."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ((name, describe_value(name, each)) for name, each in value.items())
        else:
            yield key.removesuffix("_bytes").replace("_", " "), describe_value(key, value)


def describe_value(key: str, value: object) -> str:
    """One JSON value in words; what is None does not apply or is not there."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("_bytes") and isinstance(value, (int, float)):
        return format_bytes(value)
    if isinstance(value, list):
        return ", ".join(str(each) for each in value) or "none"
    return str(value)


def _apart(verdict: Verdict, write: Callable[[float, int], str]) -> tuple[str, str]:
    """Write what was found and allowed with digits enough to differ where they do."""
    if verdict.found is None:
        return NOT_MEASURED, write(verdict.allowed, 1)
    for digits in range(1, 6):
        found, allowed = write(verdict.found, digits), write(verdict.allowed, digits)
        if found != allowed or verdict.met:
            break
    return found, allowed


def _judged(verdict: Verdict, found: str, limit: str) -> str:
    if verdict.found is None:
        return f"{NOT_MEASURED}, {limit}"
    is_floor = verdict.limit == "min_speedup"
    if verdict.met:
        return f"{'reaches' if is_floor else 'within'} the {limit}"
    return f"{found} is {'short of' if is_floor else 'over'} the {limit}"


def _scaled(value: float | None, units: tuple[str, ...]) -> str:
    if value is None:
        return NOT_MEASURED
    index = 0
    while round(value) >= 1000 and index < len(units) - 1:
        value, index = value / 1000, index + 1
    shown = f"{value:.0f}" if index == 0 else _significant(value)
    return f"{shown} {units[index]}".rstrip()


def _plain(value: float) -> str:
    shown = "0" if value == 0 else f"{value:#.3g}".rstrip(".")
    return shown.replace("-", MINUS)


def _significant(value: float) -> str:
    """Three significant digits, without an exponent."""
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:.{digits}f}"


def _written(value: float | None, write: Callable[[float], str]) -> str:
    return NOT_MEASURED if value is None else write(value)
