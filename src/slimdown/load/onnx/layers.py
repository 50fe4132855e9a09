"""Operators with weights of their own, as torch's layers: what pruning and quantizing work on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimdown.load.onnx.call import Call, Unsupported
from slimdown.load.onnx.ops.pooling import pad_space, paddings
from slimdown.load.onnx.reader import OnnxNode

CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class BatchNorm(nn.BatchNorm2d):
    """A batch norm of inputs of any rank, which a file does not tell beforehand."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class InstanceNorm(nn.Module):
    """An instance norm of inputs of any rank; `weight` and `bias` (C,), or neither."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)


@dataclass(frozen=True)
class Layer:
    """A module for an operator, still without its tensors."""

    module: nn.Module
    tensors: dict[str, str]
    """Where the module has them -> the constants that they are."""
    is_transposed: bool = False
    """Whether the weight lies the other way round in the file."""
    pads: dict[str, Any] | None = None
    """The attributes of padding that torch's layer has no words for, to be done before it."""


def find_layer(node: OnnxNode, constants: Mapping[str, Tensor]) -> Layer | None:
    """The layer of an operator whose weights are constants; None where it has none.

    Raises Unsupported for a form that is not covered.
    """
    maker = MAKERS.get(node.op)
    held = [constants.get(name) for name in node.inputs[1:]]
    if maker is None or node.inputs[0] in constants or not held:
        return None
    is_computed = any(
        tensor is None and name for tensor, name in zip(held, node.inputs[1:], strict=True)
    )
    return None if is_computed else maker(node, held)


Held = list["Tensor | None"]


def _names(node: OnnxNode, *places: str) -> dict[str, str]:
    named = zip(places, node.inputs[1:], strict=False)
    return {place: name for place, name in named if name}


def _convolution(node: OnnxNode, held: Held) -> Layer:
    (weight, *bias), attributes = held, node.attributes
    assert weight is not None
    kernel = tuple(weight.shape[2:])
    groups = attributes.get("group", 1)
    is_even, padding = _even_padding(attributes, len(kernel))
    module = CONVOLUTIONS[len(kernel) - 1](
        weight.shape[1] * groups,
        weight.shape[0],
        kernel,
        stride=tuple(attributes.get("strides", [1] * len(kernel))),
        padding=padding,
        dilation=tuple(attributes.get("dilations", [1] * len(kernel))),
        groups=groups,
        bias=bool(bias and bias[0] is not None),
        device="meta",
    )
    pads = None if is_even else {**attributes, "kernel_shape": list(kernel)}
    return Layer(module, _names(node, "weight", "bias"), pads=pads)


def _transposed_convolution(node: OnnxNode, held: Held) -> Layer:
    (weight, *bias), attributes = held, node.attributes
    assert weight is not None
    ndim = weight.ndim - 2
    is_even, padding = _even_padding(attributes, ndim)
    if not is_even or "output_shape" in attributes:
        raise Unsupported("with output_shape, auto_pad or uneven pads")
    groups = attributes.get("group", 1)
    module = TRANSPOSED[ndim - 1](
        weight.shape[0],
        weight.shape[1] * groups,
        tuple(weight.shape[2:]),
        stride=tuple(attributes.get("strides", [1] * ndim)),
        padding=padding,
        output_padding=tuple(attributes.get("output_padding", [0] * ndim)),
        groups=groups,
        bias=bool(bias and bias[0] is not None),
        dilation=tuple(attributes.get("dilations", [1] * ndim)),
        device="meta",
    )
    return Layer(module, _names(node, "weight", "bias"))


def _even_padding(attributes: Mapping[str, Any], ndim: int) -> tuple[bool, Any]:
    """Whether both ends of each axis are padded alike, and by how much."""
    auto = attributes.get("auto_pad", "NOTSET")
    pads = attributes.get("pads", [0] * (2 * ndim)) if auto == "NOTSET" else [0] * (2 * ndim)
    is_even = auto in ("NOTSET", "VALID") and pads[:ndim] == pads[ndim:]
    return is_even, tuple(pads[:ndim]) if is_even else 0


def pad_window(call: Call) -> Tensor:
    """The padding in front of a convolution that differs at both ends, or with the size."""
    x = call.tensor(0)
    return pad_space(x, *paddings(call.attributes, x.shape[2:], call.attribute("kernel_shape")))


def _gemm(node: OnnxNode, held: Held) -> Layer | None:
    weight, bias = held[0], held[1] if len(held) > 1 else None
    assert weight is not None
    is_plain = all(node.attributes.get(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    is_transposed = not node.attributes.get("transB", 0)
    out_features, in_features = weight.t().shape if is_transposed else weight.shape
    fits = bias is None or (bias.ndim == 1 and len(bias) == out_features)
    if not is_plain or not fits or node.attributes.get("transA", 0):
        return None
    module = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    return Layer(module, _names(node, "weight", "bias"), is_transposed)


def _matmul(node: OnnxNode, held: Held) -> Layer | None:
    (weight,) = held
    assert weight is not None
    if weight.ndim != 2:
        return None
    in_features, out_features = weight.shape
    module = nn.Linear(in_features, out_features, bias=False, device="meta")
    return Layer(module, _names(node, "weight"), is_transposed=True)


def _batch_norm(node: OnnxNode, held: Held) -> Layer:
    assert held[0] is not None
    if node.attributes.get("training_mode", 0):
        raise Unsupported("in training mode: export the network after model.eval()")
    eps = node.attributes.get("epsilon", 1e-5)
    module = BatchNorm(len(held[0]), eps=eps, device="meta")
    return Layer(module, _names(node, "weight", "bias", "running_mean", "running_var"))


def _instance_norm(node: OnnxNode, held: Held) -> Layer:
    weight, bias = held
    assert weight is not None
    assert bias is not None
    module = InstanceNorm(node.attributes.get("epsilon", 1e-5))
    # Of a group norm, exporters make an instance norm that neither scales nor shifts.
    changes = not (bool((weight == 1).all()) and bool((bias == 0).all()))
    return Layer(module, _names(node, "weight", "bias") if changes else {})


def _group_norm(node: OnnxNode, held: Held) -> Layer | None:
    assert held[0] is not None
    num_groups = node.attributes["num_groups"]
    if node.attributes.get("stash_type", 1) != 1:
        raise Unsupported("with stash_type other than float32")
    eps = node.attributes.get("epsilon", 1e-5)
    module = nn.GroupNorm(num_groups, len(held[0]), eps=eps, device="meta")
    return Layer(module, _names(node, "weight", "bias"))


def _layer_norm(node: OnnxNode, held: Held) -> Layer:
    weight, *bias = held
    assert weight is not None
    if len([name for name in node.outputs if name]) > 1:
        raise Unsupported("with the outputs Mean and InvStdDev")
    axis = node.attributes.get("axis", -1)
    if axis < 0 and -axis != weight.ndim:
        raise Unsupported(f"with axis={axis} and a scale of shape {tuple(weight.shape)}")
    has_bias = bool(bias and bias[0] is not None)
    eps = node.attributes.get("epsilon", 1e-5)
    module = nn.LayerNorm(tuple(weight.shape), eps=eps, bias=has_bias, device="meta")
    return Layer(module, _names(node, "weight", "bias"))


def _prelu(node: OnnxNode, held: Held) -> Layer | None:
    (slope,) = held
    assert slope is not None
    if slope.numel() > 1 and (slope.ndim != 3 or slope.shape[1:].numel() > 1):
        return None  # of another axis than the channels
    return Layer(nn.PReLU(slope.numel(), device="meta"), _names(node, "weight"))


MAKERS: dict[str, Callable[[OnnxNode, Held], Layer | None]] = {
    "Conv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "LayerNormalization": _layer_norm,
    "PRelu": _prelu,
}


def as_in(layer: Layer, place: str, tensor: Tensor) -> Tensor:
    """The tensor as the layer's module wants it."""
    own = getattr(layer.module, place)
    if place == "weight" and layer.is_transposed:
        tensor = tensor.t().contiguous()
    if isinstance(own, torch.Tensor) and own.numel() == tensor.numel():
        tensor = tensor.reshape(own.shape)
    return tensor
