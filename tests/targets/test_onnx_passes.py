from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from slimdown.targets.onnx_passes import (
    drop_unused_initializers_,
    drop_weight_zero_points_,
    fence_float_layers_,
    fold_quantized_weights_,
    precision_of,
    quantize_biases_,
    strip_,
)

WEIGHT = np.random.default_rng(0).normal(size=(4, 3, 1, 1)).astype(np.float32)
SCALE = (np.abs(WEIGHT).max((1, 2, 3)) / 127).astype(np.float32)


def quantized_conv(bias: float = 0.25) -> ModelProto:
    """A convolution on fake-quantized operands, as the exporter writes it."""
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "sx", "zx"], ["qx"], name="quantize"),
        helper.make_node("DequantizeLinear", ["qx", "sx", "zx"], ["x"]),
        helper.make_node("QuantizeLinear", ["w", "sw", "zw"], ["qw"], axis=0),
        helper.make_node("DequantizeLinear", ["qw", "sw", "zw"], ["wd"], axis=0),
        helper.make_node("Conv", ["x", "wd", "b"], ["output"]),
    ]
    constants = {
        "sx": np.float32(0.05),
        "zx": np.uint8(120),
        "w": WEIGHT,
        "sw": SCALE,
        "zw": np.zeros(4, np.int8),
        "b": np.full(4, bias, np.float32),
    }
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "conv",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 5, 5])],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 4, 5, 5])],
            [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: ModelProto) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    image = np.random.default_rng(1).normal(size=(2, 3, 5, 5)).astype(np.float32)
    (output,) = ReferenceEvaluator(model).run(None, {"input": image})
    return np.asarray(output)


def constant(model: ModelProto, name: str) -> np.ndarray:
    (found,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    return numpy_helper.to_array(found)


def count(model: ModelProto, op_type: str) -> int:
    return sum(node.op_type == op_type for node in model.graph.node)


def test_weights_are_stored_as_the_levels_that_they_become() -> None:
    model = quantized_conv()
    before = run(model)
    assert precision_of(model) == "float32"
    fold_quantized_weights_(model)
    assert np.array_equal(run(model), before)
    levels = constant(model, "qw")
    assert levels.dtype == np.int8
    assert np.abs(levels).max() == 127
    assert count(model, "QuantizeLinear") == 1  # the activation's
    assert "w" not in {tensor.name for tensor in model.graph.initializer}
    assert precision_of(model) == "int8"


def test_biases_are_stored_in_steps_of_both_scales() -> None:
    model = quantized_conv()
    fold_quantized_weights_(model)
    before = run(model)
    quantize_biases_(model)
    levels, step = constant(model, "output_bias_levels"), constant(model, "output_bias_scale")
    assert levels.dtype == np.int32
    np.testing.assert_allclose(step, 0.05 * SCALE, rtol=1e-6)
    np.testing.assert_allclose(levels * step, 0.25, atol=float(step.max()) / 2)
    np.testing.assert_allclose(run(model), before, atol=float(step.max()))


def test_a_bias_beyond_int32_stays_float() -> None:
    model = quantized_conv(bias=1e9)
    fold_quantized_weights_(model)
    quantize_biases_(model)
    assert model.graph.node[-1].input[2] == "b"


def test_a_float_convolution_keeps_its_float_bias() -> None:
    model = quantized_conv()
    model.graph.node[-1].input[0] = "input"
    quantize_biases_(model)
    assert model.graph.node[-1].input[2] == "b"


def test_zero_points_of_weights_can_be_left_out() -> None:
    model = quantized_conv()
    fold_quantized_weights_(model)
    before = run(model)
    drop_weight_zero_points_(model)
    assert np.array_equal(run(model), before)
    assert "zw" not in {tensor.name for tensor in model.graph.initializer}
    assert constant(model, "zx") == 120  # an activation's stays


def test_a_zero_point_that_is_not_zero_stays() -> None:
    model = quantized_conv()
    fold_quantized_weights_(model)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == "zw")
    tensor.CopyFrom(numpy_helper.from_array(np.array([0, 1, 0, 0], np.int8), "zw"))
    drop_weight_zero_points_(model)
    assert constant(model, "zw").tolist() == [0, 1, 0, 0]


def test_float_layers_on_int8_inputs_get_a_fence_that_changes_nothing() -> None:
    model = quantized_conv()
    model.graph.node[-1].input[1] = (
        "w"  # read in float, between a DequantizeLinear and what follows
    )
    before = run(model)
    fence_float_layers_(model)
    assert count(model, "Max") == 1
    assert np.array_equal(run(model), before)


def test_int8_layers_get_no_fence() -> None:
    model = quantized_conv()
    fold_quantized_weights_(model)
    fence_float_layers_(model)
    assert count(model, "Max") == 0


def test_strip_leaves_what_computes() -> None:
    model = quantized_conv()
    before, size = run(model), model.graph.ByteSize()
    model.doc_string = "where it came from"
    model.graph.node[0].doc_string = "line 17"
    entry = model.graph.node[0].metadata_props.add()
    entry.key, entry.value = "stack_trace", "file.py"
    model.graph.value_info.append(
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 5, 5])
    )
    strip_(model)
    assert model.graph.ByteSize() == size
    assert not model.doc_string
    assert model.producer_name == "slimdown"
    assert np.array_equal(run(model), before)


def test_unused_constants_go_and_constant_outputs_stay() -> None:
    model = quantized_conv()
    model.graph.initializer.append(numpy_helper.from_array(np.ones(9, np.float32), "unused"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(2, np.float32), "kept"))
    model.graph.output.append(helper.make_tensor_value_info("kept", TensorProto.FLOAT, [2]))
    drop_unused_initializers_(model)
    names = {tensor.name for tensor in model.graph.initializer}
    assert "unused" not in names
    assert {"kept", "w", "b", "sx"} <= names


@pytest.mark.parametrize(("dtype", "name"), [(np.float32, "float32"), (np.float16, "float16")])
def test_precision_is_that_of_the_stored_weights(dtype: type, name: str) -> None:
    model = ModelProto()
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, dtype), "w"))
    assert precision_of(model) == name
