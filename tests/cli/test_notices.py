"""Our warnings are told, those of libraries are not."""

from __future__ import annotations

import io
import warnings

import pytest
from rich.console import Console

from slimdown.cli.notices import telling_notices
from slimdown.load import DataWarning


def test_our_warnings_are_told_as_notes() -> None:
    stream = io.StringIO()
    with telling_notices(Console(file=stream, width=40), debug=False):
        warnings.warn(
            "2 of 100 images are broken [a.jpg]" + " and more" * 9, DataWarning, stacklevel=1
        )
        warnings.warn("something about tracing", UserWarning, stacklevel=1)
    assert stream.getvalue() == "note: 2 of 100 images are broken [a.jpg]" + " and more" * 9 + "\n"


def test_debugging_shows_all_warnings() -> None:
    with (
        pytest.warns(UserWarning, match="something"),
        telling_notices(Console(file=io.StringIO()), debug=True),
    ):
        warnings.warn("something about tracing", UserWarning, stacklevel=1)
