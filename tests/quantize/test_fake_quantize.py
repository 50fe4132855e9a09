from __future__ import annotations

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from slimdown.capture import capture
from slimdown.quantize import (
    PER_CHANNEL,
    PER_TENSOR,
    FakeQuantizePerChannel,
    FakeQuantizePerTensor,
    is_fake_quantized,
)


def per_tensor(scale: float = 0.1, zero_point: int = 10) -> FakeQuantizePerTensor:
    quantizer = FakeQuantizePerTensor(quant_min=0, quant_max=255)
    quantizer.scale.fill_(scale)
    quantizer.zero_point.fill_(zero_point)
    return quantizer


def per_channel(axis: int, num_channels: int = 3) -> FakeQuantizePerChannel:
    quantizer = FakeQuantizePerChannel(num_channels, axis=axis, quant_min=-128, quant_max=127)
    quantizer.scale.copy_(torch.linspace(0.01, 0.03, num_channels))
    return quantizer


def onnx_round_trip(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """What the standard says, by its own reference implementation."""
    kind = TensorProto.INT8 if scale.ndim else TensorProto.UINT8
    nodes = [
        helper.make_node("Cast", ["zero"], ["level"], to=kind),
        helper.make_node("QuantizeLinear", ["x", "scale", "level"], ["q"], axis=axis),
        helper.make_node("DequantizeLinear", ["q", "scale", "level"], ["y"], axis=axis),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape),
        helper.make_tensor_value_info("scale", TensorProto.FLOAT, scale.shape),
        helper.make_tensor_value_info("zero", TensorProto.INT32, scale.shape),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)
    model = helper.make_model(
        helper.make_graph(nodes, "round_trip", inputs, [output]),
        opset_imports=[helper.make_opsetid("", 20)],
    )
    onnx.checker.check_model(model)
    feeds = {"x": x.numpy(), "scale": scale.numpy(), "zero": zero_point.numpy()}
    (result,) = ReferenceEvaluator(model).run(None, feeds)
    return torch.from_numpy(result)


def test_per_tensor_is_quantize_linear_to_the_bit() -> None:
    x = 8 * torch.randn(4, 3, 9)  # many values are clipped
    quantizer = per_tensor()
    expected = onnx_round_trip(x, quantizer.scale, quantizer.zero_point, axis=1)
    assert torch.equal(quantizer(x), expected)
    assert 0 < (quantizer(x) == 24.5).sum() < x.numel()  # (255 - 10) * 0.1


@pytest.mark.parametrize("axis", [0, 1])
def test_per_channel_is_quantize_linear_to_the_bit(axis: int) -> None:
    x = 2 * torch.randn(3, 3, 9)
    quantizer = per_channel(axis)
    expected = onnx_round_trip(x, quantizer.scale, quantizer.zero_point, axis)
    assert torch.equal(quantizer(x), expected)


def test_rounds_half_to_even() -> None:
    quantizer = per_tensor(scale=1.0, zero_point=0)
    assert quantizer(torch.tensor([0.5, 1.5, 2.5])).tolist() == [0.0, 2.0, 2.0]


def test_is_idempotent() -> None:
    x = torch.randn(50)
    assert torch.equal(per_tensor()(per_tensor()(x)), per_tensor()(x))


def test_gradient_is_straight_through_within_the_range_and_zero_outside() -> None:
    x = torch.tensor([-1.5, -0.9, 0.0, 24.4, 25.0], requires_grad=True)
    per_tensor()(x).backward(torch.arange(1.0, 6.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]


def test_gradient_per_channel_follows_each_channel_s_own_range() -> None:
    x = torch.full((3, 2), 2.0, requires_grad=True)  # 127 * scale is 1.27, 2.54, 3.81
    per_channel(axis=0)(x).sum().backward()
    assert x.grad is not None
    assert x.grad[:, 0].tolist() == [0.0, 1.0, 1.0]


def straight_through(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    """Fake quantization for autograd, which takes the rounding for an added constant."""
    ratio = x / scale
    rounded = ratio + (ratio.round() - ratio).detach()
    return ((rounded + zero_point).clamp(quant_min, quant_max) - zero_point) * scale


def test_gradient_of_one_scale_is_that_of_learned_step_sizes() -> None:
    x, incoming = 8 * torch.randn(4, 3, 9), torch.randn(4, 3, 9)
    quantizer = per_tensor()
    quantizer.scale.requires_grad_()
    values = x.clone().requires_grad_()
    quantizer(values).backward(incoming)

    exact, scale = x.double().requires_grad_(), quantizer.scale.detach().double().requires_grad_()
    straight_through(exact, scale, quantizer.zero_point, 0, 255).backward(incoming.double())
    assert values.grad is not None
    assert exact.grad is not None
    assert scale.grad is not None
    assert 0 < (exact.grad == 0).sum() < x.numel()  # clipped on both sides, and not
    torch.testing.assert_close(values.grad.double(), exact.grad)
    expected = scale.grad / (27 * 255) ** 0.5  # an image has 27 values
    torch.testing.assert_close(quantizer.scale.grad.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("axis", [0, 1])
def test_gradient_of_scales_per_channel_is_that_of_learned_step_sizes(axis: int) -> None:
    x, incoming = 2 * torch.randn(3, 3, 9), torch.randn(3, 3, 9)
    quantizer = per_channel(axis)
    quantizer.scale.requires_grad_()
    values = x.clone().requires_grad_()
    quantizer(values).backward(incoming)

    exact, scale = x.double().requires_grad_(), quantizer.scale.detach().double().requires_grad_()
    along = scale.view([3 if dim == axis else 1 for dim in range(3)])
    straight_through(exact, along, torch.tensor(0), -128, 127).backward(incoming.double())
    assert values.grad is not None
    assert exact.grad is not None
    assert scale.grad is not None
    torch.testing.assert_close(values.grad.double(), exact.grad)
    expected = scale.grad / (27 * 127) ** 0.5  # a channel has 27 values
    torch.testing.assert_close(quantizer.scale.grad.double(), expected, rtol=1e-4, atol=0)


def test_a_scale_has_a_gradient_only_where_it_is_wanted() -> None:
    x = torch.randn(3, 3, 9)
    for quantizer in (per_tensor(), per_channel(axis=0)):
        gradients = []
        for wanted in (False, True):
            quantizer.scale.requires_grad_(wanted)
            values = x.clone().requires_grad_()
            quantizer(values).sum().backward()
            gradients.append(values.grad)
            assert (quantizer.scale.grad is not None) == wanted
        assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keeps_the_type_of_its_input_but_computes_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(100).to(dtype)
    assert torch.equal(per_tensor()(x), per_tensor()(x.float()).to(dtype))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's check reads it
def test_operators_pass_torch_s_own_checks() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    tensor, channel = per_tensor(), per_channel(axis=1)
    torch.library.opcheck(PER_TENSOR, (x, tensor.scale, tensor.zero_point, 0, 255))
    torch.library.opcheck(PER_CHANNEL, (x, channel.scale, channel.zero_point, 1, -128, 127))
    for quantizer in (tensor, channel):
        quantizer.scale.requires_grad_()
    torch.library.opcheck(PER_TENSOR, (x, tensor.scale, tensor.zero_point, 0, 255))
    torch.library.opcheck(PER_CHANNEL, (x, channel.scale, channel.zero_point, 1, -128, 127))


def test_operators_stay_whole_when_captured() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), per_tensor())
    assert not is_fake_quantized(model[0])
    assert is_fake_quantized(model)
    graph_module = capture(model, torch.randn(1, 3, 4, 4))
    assert PER_TENSOR in {node.target for node in graph_module.graph.nodes}
    assert is_fake_quantized(graph_module)
