"""Fewer levels than a byte holds: what the file computes, by ONNX's reference implementation."""

from __future__ import annotations

import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from slimdown.quantize import FakeQuantizePerChannel, FakeQuantizePerTensor
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


def test_a_weight_is_stored_within_its_levels_and_nothing_clips_it_again() -> None:
    torch.manual_seed(0)
    proto = to_onnx(Narrow((-8, 7), (0, 255)).eval(), torch.randn(1, 3, 5, 5), DIALECT)
    (levels,) = (
        numpy_helper.to_array(constant)
        for constant in proto.graph.initializer
        if constant.data_type == TensorProto.INT8 and len(constant.dims) == 4
    )
    assert (levels.min(), levels.max()) == (-8, 7)
    assert "Clip" not in {node.op_type for node in proto.graph.node}
