from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from slimdown.quantize import Quantize
from slimdown.targets import find_target
from slimdown.targets.onnx import Dialect, to_bytes, to_onnx
from slimdown.targets.widen import widen_narrow_convs_

EXAMPLE = torch.zeros(1, 3, 16, 16)
DIALECT = Dialect(int32_biases=True, weight_zero_points=True, fences=True, least_channels=1)


class Residual(nn.Module):
    """Narrow layers added up, then a shortcut that is sliced and padded to a wider stage."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 20, 3, stride=2, padding=1)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.outer(F.relu(self.inner(x))) + x)
        x = F.relu(self.wide(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 6, 6)))
        return self.head(x.mean((2, 3)))


class Concatenated(nn.Module):
    """Each narrow layer would have to be cut before it is joined to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)


class Depthwise(nn.Module):
    """A narrow layer that a grouped one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.point, self.depth = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.depth(F.relu(self.point(x)))).mean((2, 3))


class NarrowOutput(nn.Module):
    """What the narrow layer writes is what the network gives."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def export(model: nn.Module, task: Any) -> ModelProto:
    quantized = Quantize(profile="onnxruntime-x86")(model.eval(), task).model
    return to_onnx(quantized, EXAMPLE, DIALECT)


def run(model: ModelProto, images: Tensor) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(to_bytes(model), providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {"input": images.numpy()})
    return np.asarray(outputs)


def int8_weights(model: ModelProto) -> list[tuple[int, ...]]:
    arrays = map(numpy_helper.to_array, model.graph.initializer)
    return sorted(array.shape[:2] for array in arrays if array.dtype == np.int8 and array.ndim == 4)


def test_layers_that_are_added_are_padded_together_and_compute_the_same(toy_task: Any) -> None:
    narrow = export(Residual(), toy_task)
    wide = copy.deepcopy(narrow)
    widen_narrow_convs_(wide, width=16)
    assert int8_weights(narrow) == [(8, 3), (8, 12), (12, 8), (20, 8)]
    assert int8_weights(wide) == [(16, 3), (16, 16), (16, 16), (20, 16)]
    images = torch.cat(list(toy_task.batches))
    assert np.array_equal(run(narrow, images), run(wide, images))
    cuts = [node for node in wide.graph.node if "cut" in node.name]
    assert [cut.op_type for cut in cuts] == ["Slice"]  # before the shortcut's padding


@pytest.mark.parametrize(
    "model", [Concatenated(), Depthwise(), NarrowOutput()], ids=lambda m: type(m).__name__
)
def test_layers_that_would_have_to_be_cut_stay_narrow(model: nn.Module, toy_task: Any) -> None:
    narrow = export(model, toy_task)
    wide = copy.deepcopy(narrow)
    widen_narrow_convs_(wide, width=16)
    assert to_bytes(wide) == to_bytes(narrow)


def test_layers_that_are_wide_enough_stay_as_they_are(toy_task: Any) -> None:
    narrow = export(Residual(), toy_task)
    wide = copy.deepcopy(narrow)
    widen_narrow_convs_(wide, width=8)
    assert to_bytes(wide) == to_bytes(narrow)


def test_float_layers_stay_as_they_are(toy_task: Any) -> None:
    narrow = to_onnx(Residual().eval(), EXAMPLE, DIALECT)
    wide = copy.deepcopy(narrow)
    widen_narrow_convs_(wide, width=16)
    assert to_bytes(wide) == to_bytes(narrow)


def test_padded_layers_still_run_in_int8(toy_task: Any, tmp_path: Path) -> None:
    target = find_target("onnxruntime")
    model = Quantize().for_target(target)(Residual().eval(), toy_task).model
    artifact = target.export(model, toy_task, tmp_path)
    assert (16, 16) in int8_weights(onnx.load(artifact.path))
    assert artifact.kernels == {"int8": 7}  # four convolutions, two sums, the head
