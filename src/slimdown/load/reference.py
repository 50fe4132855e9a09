"""What a model reference says, without looking it up."""

from __future__ import annotations

from typing import Literal, NamedTuple

from slimdown.errors import RecipeError

FORMS = "torchvision:resnet50, timm:resnet50, package.module:factory or path/to/file.py:factory"


class Reference(NamedTuple):
    """A model reference, taken apart: `place` is the library, module or file."""

    origin: Literal["torchvision", "timm", "module", "file"]
    place: str
    name: str

    def __str__(self) -> str:
        return f"{self.place}:{self.name}"


def parse_reference(reference: str) -> Reference:
    """Take a reference apart at its last colon. Raises RecipeError for any other form."""
    place, _, name = reference.rpartition(":")
    if place and name:
        if place == "torchvision":
            return Reference("torchvision", place, name)
        if place == "timm":
            return Reference("timm", place, name)
        if place.endswith(".py"):
            return Reference("file", place, name)
        if all(part.isidentifier() for part in place.split(".")):
            return Reference("module", place, name)
    raise RecipeError(f"model.reference is {FORMS}, got {reference!r}")


def runs_user_code(reference: str) -> bool:
    """Whether loading this reference executes a module or file that is not slimdown's own."""
    parsed = parse_reference(reference)
    if parsed.origin == "module":
        return parsed.place.split(".")[0] != "slimdown"
    return parsed.origin == "file"
