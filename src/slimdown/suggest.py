"""The name that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def advise(name: str, known: Iterable[str], *, otherwise: str, noun: str = "") -> str:
    """Return "did you mean 'resnet50'?" with the closest known name, or `otherwise`."""
    by_lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"did you mean {noun}{by_lower[close[0]]!r}?" if close else otherwise


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The advice as the end of a message: ": did you mean 'resnet50'?", or nothing."""
    advice = advise(name, known, otherwise="")
    return f": {advice}" if advice else ""
