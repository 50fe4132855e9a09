"""What can go wrong, drawn as one tree, each branch with the exit code of the command line.

    ValueError
    └── SlimdownError
        ├── RecipeError      2   a recipe, an option or a setting is wrong
        ├── MissingExtra     4   an optional dependency is not installed
        ├── BadInput         5   a model, weights or data that cannot be used
        │   └── CannotCapture    a model that torch.export cannot capture
        │   └── Diverged         training met NaN or infinity
        ├── Unsafe           6   refused: using it would run unknown code
        └── OutOfResources   7   disk full, read-only folder, out of memory
    KeyboardInterrupt
    └── Interrupted        130   stopped at a clean point; the next run goes on from there

Exit code 0 is success and 3 is a budget that was not met, which is a result and not an error.
Every message says what was wrong, what was given, and how to mend it.
"""

from __future__ import annotations

from typing import ClassVar

BUDGET_NOT_MET = 3


class SlimdownError(ValueError):
    """A mistake that the user can mend."""

    exit_code: ClassVar[int] = 5


class RecipeError(SlimdownError):
    """A recipe, an option or a stage setting is wrong."""

    exit_code: ClassVar[int] = 2


class MissingExtra(SlimdownError):
    """An optional dependency is not installed."""

    exit_code: ClassVar[int] = 4

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'slimdown[{extra}]'")
        self.package = package
        self.extra = extra


class BadInput(SlimdownError):
    """A model, weights or data that cannot be used."""


class CannotCapture(BadInput):
    """A model that torch.export cannot capture; the message names the module and the reason."""


class Diverged(BadInput):
    """Training met NaN or infinity; the last good state is kept."""


class Unsafe(SlimdownError):
    """Refused: using it would run unknown code."""

    exit_code: ClassVar[int] = 6


class OutOfResources(SlimdownError):
    """The disk is full or read-only, or memory ran out."""

    exit_code: ClassVar[int] = 7


class Interrupted(KeyboardInterrupt):
    """Stopped at a clean point on request; the next run goes on from there."""

    exit_code: ClassVar[int] = 130


def first_line(error: BaseException) -> str:
    """What an error says, without what follows its first line; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def kind_and_first_line(error: BaseException) -> str:
    """The same behind the kind of the error, as in "KeyError: 'x'"."""
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"
