"""Passes over an ONNX model. Each changes the model that it is given, and does one thing."""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from slimdown.version import __version__

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

CONVS = frozenset({"Conv", "ConvTranspose"})
PRODUCTS = CONVS | {"Gemm", "MatMul"}


def name_layers_(model: ModelProto, layers: Mapping[str, str]) -> None:
    """Name convolutions and products as users know them: "layer1.0.conv1", "attn.matmul".

    `layers` are the operators of the exported graph that have a weight, and what each is called;
    others get the path of the module around and their own name. What else the exporter wrote for
    the same operator is named after it: "fc1/Add". A layer that is used again: "conv/2".
    """
    scopes = [_scope_of(node) for node in model.graph.node]
    pairs = list(zip(model.graph.node, scopes, strict=True))
    products = {scope for node, scope in pairs if node.op_type in PRODUCTS and scope is not None}
    taken: Counter[str] = Counter()
    for node, scope in pairs:
        if scope is None or scope not in products:
            continue
        path, operator = scope
        name = layers.get(operator, f"{path}.{operator}".lstrip("."))
        if node.op_type not in PRODUCTS:
            name = f"{name}/{node.op_type}"
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}/{taken[name]}"


def fold_quantized_weights_(model: ModelProto) -> None:
    """Store a weight that is quantized at every run as the int8 levels that it becomes."""
    from onnx import numpy_helper

    graph = model.graph
    constants = initializers(graph)
    for node in [node for node in graph.node if node.op_type == "QuantizeLinear"]:
        if not all(name in constants for name in node.input):
            continue
        weight, scale, zero_point = (numpy_helper.to_array(constants[n]) for n in node.input)
        shape = [-1 if dim == attribute(node, "axis", 1) else 1 for dim in range(weight.ndim)]
        limits = np.iinfo(zero_point.dtype)
        levels = np.rint(weight / scale.reshape(shape)) + zero_point.reshape(shape)
        levels = np.clip(levels, limits.min, limits.max).astype(zero_point.dtype)
        clip = next((n for n in graph.node if n.input[:1] == node.output[:1]), node)
        if clip.op_type == "Clip":  # fewer levels than the type holds
            low, high = (numpy_helper.to_array(constants[n]) for n in clip.input[1:])
            levels = np.clip(levels, low, high)
            graph.node.remove(clip)
            graph.initializer.append(numpy_helper.from_array(levels, clip.output[0]))
        else:
            graph.initializer.append(numpy_helper.from_array(levels, node.output[0]))
        graph.node.remove(node)
    drop_unused_initializers_(model)


def copy_shared_transposes_(model: ModelProto) -> None:
    """Give each product that reads a transposed weight a Transpose of its own.

    A linear that is used again shares it, and ONNX Runtime runs both uses in float then.
    """
    graph = model.graph
    writers = producers(graph)
    taken: set[str] = set()
    for node in [node for node in graph.node if node.op_type == "MatMul"]:
        transpose = writers.get(node.input[1])
        if transpose is None or transpose.op_type != "Transpose":
            continue
        source = writers.get(transpose.input[0])
        if source is None or source.op_type != "DequantizeLinear":
            continue
        if node.input[1] not in taken:
            taken.add(node.input[1])
            continue
        copied = copy.deepcopy(transpose)
        copied.name, copied.output[0] = f"{node.name}/Transpose", f"{node.output[0]}_weight"
        graph.node.insert(list(graph.node).index(node), copied)
        node.input[1] = copied.output[0]


def quantize_biases_(model: ModelProto) -> None:
    """Store the bias of a Conv or Gemm on INT8 operands as int32, in steps of both scales' product.

    ONNX Runtime has no INT8 Gemm without. A bias too large for int32 stays in float.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    constants, writers = initializers(graph), producers(graph)
    for node in [node for node in graph.node if node.op_type in ("Conv", "Gemm")]:
        if len(node.input) < 3 or node.input[2] not in constants:
            continue
        scales = [_scale_of(writers.get(name), constants) for name in node.input[:2]]
        if scales[0] is None or scales[1] is None:
            continue
        bias = numpy_helper.to_array(constants[node.input[2]])
        step = (scales[0] * scales[1]).astype(np.float32)  # () or (C_out,)
        levels = np.rint(bias / step)
        if np.abs(levels).max() >= 2**31:
            continue
        name = f"{node.output[0]}_bias"
        graph.initializer.append(numpy_helper.from_array(levels.astype(np.int32), f"{name}_levels"))
        graph.initializer.append(numpy_helper.from_array(step, f"{name}_scale"))
        dequantize = helper.make_node(
            "DequantizeLinear",
            [f"{name}_levels", f"{name}_scale"],
            [name],
            name=f"node_{name}",
            axis=0,
        )
        graph.node.insert(list(graph.node).index(node), dequantize)
        node.input[2] = name
    drop_unused_initializers_(model)


def pack_narrow_weights_(model: ModelProto) -> None:
    """Store weights that fit into 4 bits as int4, two in a byte, cast to int8 where they are read.

    Runtimes fold the cast when they open the file, and take their INT8 kernels as before. Needs
    opset 21.
    """
    import ml_dtypes
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    constants = initializers(graph)
    for node in [node for node in graph.node if node.op_type == "DequantizeLinear"]:
        weight = constants.get(node.input[0])
        if weight is None or weight.data_type != TensorProto.INT8 or len(weight.dims) < 2:
            continue
        levels = numpy_helper.to_array(weight)
        if levels.min() < -8 or levels.max() > 7:
            continue
        packed, name = f"{weight.name}_int4", f"{node.output[0]}_int8"
        if packed not in initializers(graph):  # several layers may share a weight
            tensor = numpy_helper.from_array(levels.astype(ml_dtypes.int4), packed)
            graph.initializer.append(tensor)
        unpack = helper.make_node(
            "Cast", [packed], [name], name=f"node_{name}", to=TensorProto.INT8
        )
        graph.node.insert(list(graph.node).index(node), unpack)
        node.input[0] = name
    drop_unused_initializers_(model)


def drop_weight_zero_points_(model: ModelProto) -> None:
    """Leave out the zero points of weights that are zero, which is what their absence means."""
    from onnx import numpy_helper

    constants = initializers(model.graph)
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or len(node.input) < 3:
            continue
        if node.input[0] in constants and not numpy_helper.to_array(constants[node.input[2]]).any():
            del node.input[2]
    drop_unused_initializers_(model)


def fence_float_layers_(model: ModelProto) -> None:
    """Put a maximum of one value, which changes nothing, before float layers on INT8 inputs.

    Between a DequantizeLinear and a QuantizeLinear, ONNX Runtime quantizes a float weight on its
    own, also that of a layer which the user wants in float. It does not see through this.
    """
    from onnx import helper

    graph = model.graph
    constants, writers = initializers(graph), producers(graph)
    for node in [node for node in graph.node if node.op_type in ("Conv", "ConvTranspose", "Gemm")]:
        source = writers.get(node.input[0])
        if source is None or source.op_type != "DequantizeLinear" or node.input[1] not in constants:
            continue
        name = f"{node.output[0]}_fence"
        fence = helper.make_node("Max", [node.input[0]], [name], name=f"node_{name}")
        graph.node.insert(list(graph.node).index(node), fence)
        node.input[0] = name


def strip_(model: ModelProto) -> None:
    """Drop what no runtime reads: where nodes came from, inferred shapes, notes."""
    graph = model.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer, graph, model):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    del graph.value_info[:]
    model.producer_name, model.producer_version = "slimdown", __version__


def precision_of(model: ModelProto) -> Literal["float32", "float16", "int8"]:
    """The lowest precision that weights are stored in."""
    from onnx import TensorProto

    read_as_levels = {
        node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"
    }
    types = {
        constant.data_type
        for constant in model.graph.initializer
        if constant.data_type != TensorProto.INT8 or constant.name in read_as_levels
    }
    if types & {TensorProto.INT8, TensorProto.INT4}:
        return "int8"
    return "float16" if TensorProto.FLOAT16 in types else "float32"


def drop_unused_initializers_(model: ModelProto) -> None:
    """Drop the constants that no node reads and that are no output."""
    graph = model.graph
    read = {name for node in graph.node for name in node.input}
    read |= {output.name for output in graph.output}
    kept = [constant for constant in graph.initializer if constant.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def initializers(graph: GraphProto) -> dict[str, TensorProto]:
    """The constants of a graph by name."""
    return {constant.name: constant for constant in graph.initializer}


def producers(graph: GraphProto) -> dict[str, NodeProto]:
    """The node that computes each value."""
    return {name: node for node in graph.node for name in node.output}


def attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((found.i for found in node.attribute if found.name == name), default)


def _scope_of(node: NodeProto) -> tuple[str, str] | None:
    """The path of the module that a node was in, and its operator in the exported graph."""
    told = {each.key: each.value for each in node.metadata_props}
    names = ast.literal_eval(told.get("pkg.torch.onnx.name_scopes", "[]"))
    return (names[-2], names[-1]) if len(names) >= 2 else None


def _scale_of(
    node: NodeProto | None, constants: dict[str, TensorProto]
) -> npt.NDArray[np.float32] | None:
    """The scale of a DequantizeLinear, where it is a constant."""
    from onnx import numpy_helper

    if node is None or node.op_type != "DequantizeLinear" or node.input[1] not in constants:
        return None
    return numpy_helper.to_array(constants[node.input[1]])
