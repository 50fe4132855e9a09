"""The runtimes that slimdown deploys to. A new one is a new file and a new line here."""

from __future__ import annotations

from slimdown.core import Target
from slimdown.errors import RecipeError
from slimdown.suggest import advise
from slimdown.targets.onnxruntime import OnnxRuntime
from slimdown.targets.openvino import OpenVino

TARGETS: dict[str, Target] = {
    "onnxruntime": OnnxRuntime(),
    "openvino": OpenVino(),
}


def find_target(name: str) -> Target:
    """The target of that name. Raises RecipeError."""
    if name in TARGETS:
        return TARGETS[name]
    advice = advise(name, TARGETS, otherwise=f"choose among {', '.join(TARGETS)}")
    raise RecipeError(f"targets names no runtime: {name!r}; {advice}")
