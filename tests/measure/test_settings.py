"""Measure settings are checked where they are made."""

from __future__ import annotations

import pytest

from slimdown.errors import RecipeError
from slimdown.measure import MeasureSettings


def test_defaults_are_one_image_on_one_thread() -> None:
    settings = MeasureSettings()
    assert (settings.batch_size, settings.num_threads, settings.memory) == (1, 1, True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0),
        ("num_threads", -1),
        ("num_warmup", -1),
        ("num_samples", 0),
        ("num_samples", 1.5),
        ("batch_size", True),
        ("memory", 1),
    ],
)
def test_wrong_values_are_named(field: str, value: object) -> None:
    with pytest.raises(RecipeError, match=rf"measure\.{field} must be .*got {value!r}"):
        MeasureSettings(**{field: value})  # type: ignore[arg-type]
