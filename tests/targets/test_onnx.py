from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from torch import Tensor, nn

from slimdown.errors import BadInput
from slimdown.quantize import Quantize
from slimdown.targets import onnx as onnx_target
from slimdown.targets.onnx import INPUT, OPSET, OUTPUT, Dialect, to_bytes, to_onnx

FULL = Dialect(int32_biases=True, weight_zero_points=True, fences=True, least_channels=1)
TERSE = Dialect(int32_biases=False, weight_zero_points=False, fences=False, least_channels=1)
EXAMPLE = torch.zeros(1, 3, 16, 16)


def constants(model: ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.fixture
def quantized(tiny_net: nn.Module, toy_task: Any) -> nn.Module:
    return Quantize()(tiny_net, toy_task).model


def test_float_export_is_checked_and_named(tiny_net: nn.Module) -> None:
    model = to_onnx(tiny_net.train(), EXAMPLE, FULL)
    assert tiny_net.training  # left as it was
    onnx.checker.check_model(model, full_check=True)
    assert [opset.version for opset in model.opset_import if not opset.domain] == [OPSET]
    assert [value.name for value in model.graph.input] == [INPUT]
    assert [value.name for value in model.graph.output] == [OUTPUT]
    dims = [
        value.type.tensor_type.shape.dim[0] for value in (*model.graph.input, *model.graph.output)
    ]
    assert [dim.dim_param for dim in dims] == ["batch", "batch"]
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert not model.functions


@pytest.mark.parametrize("dialect", [FULL, TERSE], ids=["full", "terse"])
def test_quantized_weights_are_int8_in_the_file(quantized: nn.Module, dialect: Dialect) -> None:
    model = to_onnx(quantized, EXAMPLE, dialect)
    onnx.checker.check_model(model, full_check=True)
    stored = constants(model)
    weights = {name: array for name, array in stored.items() if array.ndim > 1}
    assert len(weights) == 5
    assert {array.dtype for array in weights.values()} == {np.dtype(np.int8)}
    floats = [array for array in stored.values() if array.dtype == np.float32]
    assert max(array.size for array in floats) <= 32  # scales and biases
    standard = {node.domain for node in model.graph.node}
    assert standard == {""}


def test_levels_in_the_file_are_those_that_torch_trained_with(quantized: nn.Module) -> None:
    stored = constants(to_onnx(quantized, EXAMPLE, FULL))
    scale = quantized.get_submodule("weight_quantizers.conv2d_2").scale
    with torch.no_grad():
        weight = quantized.get_submodule("weight_quantizers.conv2d_2")(
            quantized.get_submodule("conv1").weight
        )
    expected = (weight / scale.view(-1, 1, 1, 1)).round().to(torch.int8).numpy()
    assert any(
        array.shape == expected.shape and (array == expected).all() for array in stored.values()
    )


def test_dialects_differ_in_biases_and_zero_points(quantized: nn.Module) -> None:
    full, terse = (to_onnx(quantized, EXAMPLE, dialect) for dialect in (FULL, TERSE))
    int32 = [sum(a.dtype == np.int32 for a in constants(m).values()) for m in (full, terse)]
    assert int32 == [5, 0]
    inputs = [
        {len(n.input) for n in m.graph.node if n.op_type == "DequantizeLinear"}
        for m in (full, terse)
    ]
    assert inputs == [{2, 3}, {2, 3}]  # int32 biases have no zero point; activations have one
    assert len(to_bytes(terse)) < len(to_bytes(full))


def test_int8_file_is_a_quarter_and_float16_a_half(toy_task: Any) -> None:
    wide = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten())
    full = len(to_bytes(to_onnx(wide.eval(), EXAMPLE, FULL)))
    int8, half = (
        len(to_bytes(to_onnx(Quantize(precision=name)(wide, toy_task).model, EXAMPLE, FULL)))
        for name in ("int8", "float16")
    )
    assert int8 < 0.3 * full
    assert half < 0.53 * full


def test_float16_file_computes_in_float16_between_float32(
    tiny_net: nn.Module, toy_task: Any
) -> None:
    half = Quantize(precision="float16")(tiny_net, toy_task).model
    model = to_onnx(half, EXAMPLE, FULL)
    assert {tensor.data_type for tensor in model.graph.initializer} >= {TensorProto.FLOAT16}
    assert not any(a.dtype == np.float32 and a.size > 1 for a in constants(model).values())
    kinds = [
        value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)
    ]
    assert kinds == [TensorProto.FLOAT, TensorProto.FLOAT]
    assert model.graph.node[0].op_type == "Cast"


def test_equal_models_give_equal_bytes(quantized: nn.Module) -> None:
    first, second = (to_bytes(to_onnx(quantized, EXAMPLE, FULL)) for _ in range(2))
    assert first == second


SCRIPT = """
import hashlib, torch
from torch import nn
from slimdown.quantize import Quantize
from slimdown.targets.onnx import Dialect, to_bytes, to_onnx

class Task:
    example_input = torch.zeros(1, 3, 8, 8)
    def calibration_batches(self):
        return [torch.linspace(-1, 1, 4 * 192).view(4, 3, 8, 8)]

torch.manual_seed(5)
body = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()
net = nn.Sequential(*body, nn.Linear(288, 4))
model = Quantize()(net.eval(), Task()).model
dialect = Dialect(int32_biases=True, weight_zero_points=True, fences=True, least_channels=1)
print(hashlib.sha256(to_bytes(to_onnx(model, Task.example_input, dialect))).hexdigest())
"""


@pytest.mark.slow
def test_bytes_are_the_same_in_another_process() -> None:
    hashes = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(hashes) == 1
    assert len(hashes.pop().strip()) == hashlib.sha256().digest_size * 2


def test_several_outputs_are_written_in_order() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            features = self.conv(x)
            return self.head(features.mean((2, 3))), features

    model = to_onnx(Heads(), EXAMPLE, FULL)
    assert len(model.graph.output) == 2
    assert model.graph.output[0].name == OUTPUT
    assert len(model.graph.output[1].type.tensor_type.shape.dim) == 4


def test_a_batch_that_is_fixed_by_the_model_is_bad_input() -> None:
    class OneImage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3 * 16 * 16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.reshape(1, -1))

    with pytest.raises(BadInput, match=r"cannot be written as ONNX.*keep the batch size out"):
        to_onnx(OneImage(), EXAMPLE, FULL)


class KeepsItsShape(nn.Module):
    """As heads of detectors do, which make their anchors anew when the shape changes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.shape: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.shape != x.shape:
            self.shape = x.shape
            self.places = torch.ones(x.shape[2:])
        return torch.cat([x * self.places for _ in range(len(x[0]))], 1)


def test_a_model_that_keeps_the_shape_it_last_saw() -> None:
    model = KeepsItsShape().eval()
    images = torch.rand(2, 3, 16, 16)
    expected = model(images)  # which it remembers
    proto = to_onnx(model, EXAMPLE, FULL)
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    session = onnxruntime.InferenceSession(to_bytes(proto), providers=["CPUExecutionProvider"])
    for count in (1, 2):
        (output,) = session.run(None, {INPUT: images[:count].numpy()})
        assert np.allclose(output, expected[:count].detach().numpy(), atol=1e-5)


def test_a_model_beyond_two_gigabytes_is_bad_input(
    tiny_net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_target, "MAX_BYTES", 1000)
    with pytest.raises(BadInput, match="one ONNX file holds at most 2 GiB"):
        to_onnx(tiny_net, EXAMPLE, FULL)


def test_file_reads_back(tiny_net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(to_bytes(to_onnx(tiny_net, EXAMPLE, FULL)))
    onnx.checker.check_model(str(path), full_check=True)
