"""The runtimes that slimdown deploys to. A new one is a new file and a new line here."""

from __future__ import annotations

import difflib

from slimdown.core import Target
from slimdown.errors import RecipeError
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
    near = difflib.get_close_matches(name, TARGETS, n=1)
    advice = f"did you mean {near[0]}?" if near else f"choose among {', '.join(TARGETS)}"
    raise RecipeError(f"targets names no runtime: {name!r}; {advice}")
