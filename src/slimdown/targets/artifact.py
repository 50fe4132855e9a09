"""An ONNX artifact on disk: the model, how to prepare its input, and what its outputs mean."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
from torch import Tensor

from slimdown.core import Artifact, Preprocess, Task
from slimdown.files import hash_files, write_bytes
from slimdown.targets.onnx import to_bytes
from slimdown.targets.onnx_passes import precision_of

if TYPE_CHECKING:
    from onnx import ModelProto


def write_artifact(target: str, model: ModelProto, task: Task, folder: Path) -> Artifact:
    """Write `model.onnx`, and `preprocess.json` and `labels.json` where the task knows them."""
    contents = {"model.onnx": to_bytes(model)}
    preprocess = getattr(task, "preprocess", None)
    if isinstance(preprocess, Preprocess):
        contents["preprocess.json"] = _to_json(asdict(preprocess))
    labels = getattr(task, "labels", None)
    if labels is not None and len(labels):
        contents["labels.json"] = _to_json([str(label) for label in labels])
    for name, content in contents.items():
        write_bytes(folder / name, content)
    files = tuple(folder / name for name in contents)
    return Artifact(
        target=target,
        path=files[0],
        files=files,
        sha256=hash_files(files),
        size_bytes=sum(len(content) for content in contents.values()),
        precision=precision_of(model),
    )


def to_array(inputs: Tensor) -> npt.NDArray[Any]:
    """Inputs as a runtime takes them: floats as float32, and integers as they are."""
    inputs = inputs.detach().cpu()
    return (inputs.float() if inputs.is_floating_point() else inputs).contiguous().numpy()


def _to_json(value: object) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"
