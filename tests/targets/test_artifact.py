from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from slimdown.targets.artifact import write_artifact
from slimdown.targets.onnx import Dialect, to_onnx

EXAMPLE = torch.zeros(1, 3, 16, 16)


@pytest.fixture
def model(tiny_net: nn.Module) -> Any:
    dialect = Dialect(int32_biases=True, weight_zero_points=True, fences=True, least_channels=1)
    return to_onnx(tiny_net, EXAMPLE, dialect)


def test_model_lies_beside_its_preprocessing_and_labels(
    model: Any, toy_task: Any, tmp_path: Path
) -> None:
    artifact = write_artifact("somewhere", model, toy_task, tmp_path)
    assert [file.name for file in artifact.files] == [
        "model.onnx",
        "preprocess.json",
        "labels.json",
    ]
    assert artifact.path == tmp_path / "model.onnx"
    assert sorted(tmp_path.iterdir()) == sorted(artifact.files)  # no temporary file is left
    assert artifact.size_bytes == sum(file.stat().st_size for file in artifact.files)
    contents = b"".join(file.read_bytes() for file in artifact.files)
    assert artifact.sha256 == hashlib.sha256(contents).hexdigest()
    assert json.loads(artifact.files[1].read_text())["mean"] == [0.5, 0.5, 0.5]
    assert json.loads(artifact.files[2].read_text()) == ["ant", "bee", "fly", "wasp"]
    assert (artifact.target, artifact.precision, artifact.verified) == (
        "somewhere",
        "float32",
        "exported",
    )


def test_a_task_that_knows_neither_gets_the_model_alone(model: Any, tmp_path: Path) -> None:
    artifact = write_artifact("somewhere", model, SimpleNamespace(), tmp_path)
    assert artifact.files == (artifact.path,)
