"""Fewer levels than a byte holds: what the file computes, by ONNX's reference implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from slimdown.quantize import FakeQuantizePerChannel, FakeQuantizePerTensor, Quantize
from slimdown.targets import find_target
from slimdown.targets.onnx import Dialect, to_onnx

DIALECT = Dialect(int32_biases=False, weight_zero_points=True, fences=False, least_channels=1)


class Narrow(nn.Module):
    """A convolution whose weight and input have few levels, both clipped hard."""

    def __init__(self, weight_levels: tuple[int, int], input_levels: tuple[int, int]) -> None:
        super().__init__()
        low, high = weight_levels
        self.conv = nn.Conv2d(3, 4, 1)
        self.weights = FakeQuantizePerChannel(4, axis=0, quant_min=low, quant_max=high)
        self.weights.scale.copy_(torch.linspace(0.01, 0.04, 4))
        low, high = input_levels
        self.inputs = FakeQuantizePerTensor(quant_min=low, quant_max=high)
        self.inputs.scale.fill_(0.125)
        self.inputs.zero_point.fill_((low + high) // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        return nn.functional.conv2d(x, self.weights(self.conv.weight), self.conv.bias)


@pytest.mark.parametrize("weight_levels", [(-8, 7), (-64, 63), (-128, 127)])
@pytest.mark.parametrize("input_levels", [(0, 15), (-8, 7), (0, 255)])
def test_levels_saturate_in_the_file_as_in_torch(
    weight_levels: tuple[int, int], input_levels: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    model, x = Narrow(weight_levels, input_levels).eval(), 4 * torch.randn(2, 3, 5, 5)
    proto = to_onnx(model, x[:1], DIALECT)
    (outputs,) = ReferenceEvaluator(proto).run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(outputs), model(x), rtol=1e-5, atol=1e-5)


def weight_in(proto: ModelProto) -> TensorProto:
    (weight,) = (constant for constant in proto.graph.initializer if len(constant.dims) == 4)
    return weight


@pytest.mark.parametrize(
    ("levels", "kind"),
    [((-2, 1), TensorProto.INT4), ((-8, 7), TensorProto.INT4), ((-16, 15), TensorProto.INT8)],
)
def test_a_weight_is_stored_within_its_levels_and_nothing_clips_it_again(
    levels: tuple[int, int], kind: int
) -> None:
    torch.manual_seed(0)
    proto = to_onnx(Narrow(levels, (0, 255)).eval(), torch.randn(1, 3, 5, 5), DIALECT)
    weight = weight_in(proto)
    stored = numpy_helper.to_array(weight).astype(np.int8)
    assert weight.data_type == kind
    assert (stored.min(), stored.max()) == levels
    assert "Clip" not in {node.op_type for node in proto.graph.node}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_packed_weights_run_on_integers_and_give_the_same(
    runtime: str, tiny_net: nn.Module, toy_task: Any, tmp_path: Path
) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    target = find_target(runtime)
    images = torch.cat(list(toy_task.batches))
    sizes, outputs = {}, {}
    for bits in (4, 8):
        stage = Quantize(weight_bits=bits, effort="fast").for_target(target)
        module = stage(tiny_net, toy_task).model
        artifact = target.export(module, toy_task, tmp_path / str(bits))
        sizes[bits] = artifact.size_bytes
        assert {layer.precision for layer in artifact.audit} == {"int8"}
        proto = onnx.load(artifact.path)
        names = {node.input[0] for node in proto.graph.node if node.op_type == "Cast"}
        packed = [each for each in proto.graph.initializer if each.name in names]
        assert len(packed) == (3 if bits == 4 else 0)  # all but the first and the last
        assert all(each.data_type == TensorProto.INT4 for each in packed)
        outputs[bits] = target.load(artifact)(images)
        with torch.no_grad():
            assert agreement(outputs[bits], module(images)) > 30
    assert sizes[4] < sizes[8] - 3500  # half of the 9,472 bytes of such weights, less their nodes


def agreement(ours: Tensor, theirs: Tensor) -> float:
    """Signal over noise of the centered outputs, dB."""
    signal = (theirs - theirs.mean(0)).square().mean()
    return float(10 * torch.log10(signal / (ours - theirs).square().mean()))
