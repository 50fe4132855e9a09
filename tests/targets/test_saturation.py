"""Weights of 7 bits, for CPUs that add two products of 8-bit levels in 16 bits, with saturation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from torch import nn

from slimdown.quantize import Quantize
from slimdown.targets.onnx import to_onnx
from slimdown.targets.onnxruntime import DIALECT, OnnxRuntime


def weights_of(proto: ModelProto) -> dict[str, Any]:
    """The int8 weights of a file, (C_out, K) each, wide enough for any product."""
    constants = (c for c in proto.graph.initializer if c.data_type == TensorProto.INT8)
    weights = {c.name: numpy_helper.to_array(c).astype(np.int64) for c in constants}
    return {name: w.reshape(len(w), -1) for name, w in weights.items() if w.ndim > 1}


def dot(levels: Any, weights: Any, *, saturates: bool) -> Any:
    """sum of u8 * s8 as VPMADDUBSW and VPADDD do it: pairs in 16 bits, their sums in 32."""
    products = weights * levels
    if products.shape[1] % 2:
        products = np.pad(products, ((0, 0), (0, 1)))
    pairs = products[:, 0::2] + products[:, 1::2]
    return (np.clip(pairs, -(2**15), 2**15 - 1) if saturates else pairs).sum(1)


@pytest.mark.parametrize(("bits", "is_exact"), [(8, False), (7, True), (6, True)])
def test_sums_of_two_products_fit_into_16_bits_with_7_bits_of_weight(
    tiny_net: nn.Module, toy_task: Any, bits: int, is_exact: bool
) -> None:
    quantized = Quantize(weight_bits=bits, effort="fast")(tiny_net, toy_task).model
    proto = to_onnx(quantized, toy_task.example_input, DIALECT)
    weights = weights_of(proto)
    assert len(weights) == 5
    # Levels that are worst for each row: at their highest where its weights are of one sign.
    exact = []
    for each in weights.values():
        for rows in (each * (each > 0), each * (each < 0)):
            sums = [dot(255, rows, saturates=saturates) for saturates in (False, True)]
            exact.append(bool(np.array_equal(*sums)))
    ends_have_8 = bits < 7  # the first and the last layer, which fewer bits spare
    assert all(exact) == (is_exact and not ends_have_8)
    assert sum(exact) >= (6 if ends_have_8 else 10 if is_exact else 0)
    assert "Clip" not in {node.op_type for node in proto.graph.node}


def test_7_bits_run_in_the_same_kernels_and_give_what_torch_gives(
    tiny_net: nn.Module, toy_task: Any, tmp_path: Path
) -> None:
    target, x = OnnxRuntime(), torch.cat(list(toy_task.batches))
    kernels = {}
    for bits in (7, 8):
        quantized = Quantize(weight_bits=bits, effort="fast")(tiny_net, toy_task).model
        artifact = target.export(quantized, toy_task, tmp_path / str(bits))
        kernels[bits] = artifact.kernels
        with torch.no_grad():
            expected, floats = quantized(x), tiny_net(x)
        outputs = target.load(artifact)(x)
        step = (expected - floats).abs().max()
        assert float((outputs - expected).abs().max()) < float(step)
    assert kernels[7] == kernels[8]
