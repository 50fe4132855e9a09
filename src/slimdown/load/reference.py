"""What a model reference says, without looking it up."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

from slimdown.errors import RecipeError

FORMS = (
    "torchvision:resnet50, timm:resnet50, transformers:vit, ultralytics:yolo11n.yaml, "
    "package.module:factory, path/to/file.py:factory or path/to/model.onnx"
)
Library: TypeAlias = Literal["torchvision", "timm", "transformers", "ultralytics"]


class Reference(NamedTuple):
    """A model reference, taken apart: `place` is the library, module or file.

    An ONNX file holds one model, so it has no `name`.
    """

    origin: Library | Literal["module", "file", "onnx"]
    place: str
    name: str

    def __str__(self) -> str:
        return f"{self.place}:{self.name}" if self.name else self.place


def parse_reference(reference: str) -> Reference:
    """Take a reference apart at its colon. Raises RecipeError for any other form."""
    library, _, model = reference.partition(":")
    for known in get_args(Library):
        if library == known and model:
            return Reference(known, library, model)
    if reference.endswith(".onnx"):
        return Reference("onnx", reference, "")
    place, _, name = reference.rpartition(":")
    if place and name and place not in get_args(Library):
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
