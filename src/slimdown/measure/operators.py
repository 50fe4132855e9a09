"""One operator as an ONNX model, so that a runtime's time for it alone can be measured.

A call of a runtime costs some microseconds by itself, and a convolution of its own would have its
input and output brought into the runtime's inner layout and back, which inside of a network
happens once or never. So a model holds the operator several times, side by side on one input, each
copy with weights of its own, and of each output nothing leaves but a mean. An operator with many
weights is in there once: it takes long beside all that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from slimdown.core import Operation
from slimdown.targets.onnx import INPUT, OPSET

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

NUM_COPIES = 4
MANY_WEIGHTS = 2**20

SPREAD = 0.05
"""Of the random weights: small, so that no sum overflows."""


class _Graph:
    """Nodes and constants of a model to be; each operator appends itself and names its output."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, np.ndarray[Any, Any]] = {}
        self.generator = np.random.default_rng(0)

    def add(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        from onnx import helper

        names = [f"{operator}-{len(self.nodes)}-{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return names

    def constant(self, values: Sequence[int]) -> str:
        return self._keep(np.array(values, dtype=np.int64))

    def weight(self, *shape: int) -> str:
        values = self.generator.standard_normal(shape, dtype=np.float32)
        return self._keep(SPREAD * values)

    def _keep(self, values: np.ndarray[Any, Any]) -> str:
        name = f"constant-{len(self.constants)}"
        self.constants[name] = values
        return name


def num_weights(operation: Operation) -> int:
    """How many values the weights of one copy have."""
    has_weight = operation.kind not in ("matmul", "attention")
    return math.prod(operation.shapes[1]) if has_weight else 0


def num_copies(operation: Operation) -> int:
    """How many of an operator its model holds."""
    return 1 if num_weights(operation) > MANY_WEIGHTS else NUM_COPIES


def input_shape(operation: Operation) -> tuple[int, ...]:
    """The one input of the operator's model; operands that are all activations share it, flat."""
    if operation.kind in ("matmul", "attention"):
        return (1, sum(math.prod(shape) * times for shape, times in _operands(operation)))
    return operation.shapes[0]


def build_operator(operation: Operation) -> ModelProto:
    """A checked model of `num_copies` of an operator, for any batch size if it has weights."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = _Graph()
    outputs = BUILDERS[operation.kind](graph, operation)
    shape: list[int | str] = list(input_shape(operation))
    if operation.kind in ("convolution", "transposed_convolution", "linear"):
        shape[0] = "batch"  # as slimdown exports networks
    # A pooling takes a convolution's output in the layout that the runtime has it in.
    is_convolution = operation.kind in ("convolution", "transposed_convolution")
    if is_convolution:
        means = [graph.add("GlobalAveragePool", output)[0] for output in outputs]
    else:
        means = [graph.add("ReduceMean", output, keepdims=0)[0] for output in outputs]
    mean_shape = [None] * len(shape) if is_convolution else []
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "operator",
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(m, TensorProto.FLOAT, mean_shape) for m in means],
            [numpy_helper.from_array(value, name) for name, value in graph.constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    return model


def _convolution(graph: _Graph, operation: Operation) -> list[str]:
    (_, channels, *_), weight = operation.shapes
    return [
        graph.add(
            "Conv",
            INPUT,
            graph.weight(*weight),
            graph.weight(weight[0]),
            group=channels // weight[1],
            **_window(operation),
        )[0]
        for _ in range(num_copies(operation))
    ]


def _transposed_convolution(graph: _Graph, operation: Operation) -> list[str]:
    _, weight, bias = operation.shapes
    return [
        graph.add(
            "ConvTranspose",
            INPUT,
            graph.weight(*weight),
            graph.weight(*bias),
            group=bias[0] // weight[1],
            output_padding=dict(operation.settings)["output_padding"],
            **_window(operation),
        )[0]
        for _ in range(num_copies(operation))
    ]


def _window(operation: Operation) -> Mapping[str, Any]:
    settings = dict(operation.settings)
    return {
        "strides": settings["stride"],
        "dilations": settings["dilation"],
        "pads": settings["padding"] * 2,
    }


def _linear(graph: _Graph, operation: Operation) -> list[str]:
    x, (channels, features) = operation.shapes
    if len(x) == 2:
        return [
            graph.add(
                "Gemm", INPUT, graph.weight(channels, features), graph.weight(channels), transB=1
            )[0]
            for _ in range(num_copies(operation))
        ]
    products = [
        graph.add("MatMul", INPUT, graph.weight(features, channels))[0]
        for _ in range(num_copies(operation))
    ]
    return [graph.add("Add", each, graph.weight(channels))[0] for each in products]


def _matmul(graph: _Graph, operation: Operation) -> list[str]:
    a, *others = _unpack(graph, operation)
    return [graph.add("MatMul", a, b)[0] for b in others]


def _attention(graph: _Graph, operation: Operation) -> list[str]:
    query, value, *keys = _unpack(graph, operation)
    ndim = len(operation.shapes[0])
    swapped = [*range(ndim - 2), ndim - 1, ndim - 2]
    outputs = []
    for key in keys:
        (turned,) = graph.add("Transpose", key, perm=swapped)
        (scores,) = graph.add("MatMul", query, turned)
        (shares,) = graph.add("Softmax", scores, axis=-1)
        outputs += graph.add("MatMul", shares, value)
    return outputs


def _operands(operation: Operation) -> list[tuple[tuple[int, ...], int]]:
    """The activations that a product multiplies, each with how many of them there are.

    Those that differ between the copies come last: equal copies would be computed once.
    """
    if operation.kind == "matmul":
        a, b = operation.shapes
        return [(a, 1), (b, NUM_COPIES)]
    query, key, value = operation.shapes
    return [(query, 1), (value, 1), (key, NUM_COPIES)]


def _unpack(graph: _Graph, operation: Operation) -> list[str]:
    """Cut the flat input into the operands."""
    shapes = [shape for shape, times in _operands(operation) for _ in range(times)]
    lengths = graph.constant([math.prod(shape) for shape in shapes])
    parts = graph.add("Split", INPUT, lengths, outputs=len(shapes), axis=1)
    return [
        graph.add("Reshape", part, graph.constant(shape))[0]
        for part, shape in zip(parts, shapes, strict=True)
    ]


BUILDERS: dict[str, Callable[[_Graph, Operation], list[str]]] = {
    "convolution": _convolution,
    "transposed_convolution": _transposed_convolution,
    "linear": _linear,
    "matmul": _matmul,
    "attention": _attention,
}
