"""Each operator alone, in the forms that files have it in, against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from slimdown.errors import BadInput
from slimdown.load.onnx import load_onnx

RNG = np.random.default_rng(0)
TOLERANCE = 1e-4


def noise(*shape: int) -> Any:
    return RNG.normal(size=shape).astype(np.float32)


def ints(*values: int) -> Any:
    return np.array(values, dtype=np.int64)


def write(
    path: Path,
    op: str,
    constants: tuple[Any, ...] = (),
    *,
    opset: int = 17,
    outputs: int = 1,
    shape: tuple[Any, ...] = ("n", 4, 8, 8),
    between: tuple[onnx.NodeProto, ...] = (),
    **attributes: Any,
) -> Path:
    """A file of one operator on an image `x`, with constants as its further inputs."""
    names = ["" if each is None else f"c{index}" for index, each in enumerate(constants)]
    results = [f"y{index}" for index in range(outputs)]
    node = helper.make_node(op, ["x", *names], results, name="the_node", **attributes)
    graph = helper.make_graph(
        [*between, node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(each, TensorProto.FLOAT, None) for each in results],
        [
            numpy_helper.from_array(each, name)
            for each, name in zip(constants, names, strict=True)
            if each is not None
        ],
    )
    opsets = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def check(path: Path) -> None:
    session = onnxruntime.InferenceSession(path)
    module = load_onnx(path)
    for batch in (1, 3):
        x = noise(batch, 4, 8, 8)
        theirs = session.run(None, {"x": x})
        with torch.no_grad():
            ours = module(torch.from_numpy(x))
        for a, b in zip(ours if isinstance(ours, tuple) else (ours,), theirs, strict=True):
            assert tuple(a.shape) == b.shape
            assert np.abs(a.numpy() - b).max() <= TOLERANCE * max(np.abs(b).max(), 1e-6)


CASES: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    # weights
    "conv": ("Conv", (noise(6, 4, 3, 3), noise(6)), {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    "conv, grouped": ("Conv", (noise(8, 2, 3, 3),), {"group": 2, "dilations": [2, 1]}),
    "conv, uneven": ("Conv", (noise(6, 4, 3, 3),), {"pads": [0, 1, 2, 1]}),
    "conv, same": ("Conv", (noise(6, 4, 3, 3),), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "conv, same lower": ("Conv", (noise(6, 4, 2, 2),), {"auto_pad": "SAME_LOWER"}),
    "conv, valid": ("Conv", (noise(6, 4, 3, 3),), {"auto_pad": "VALID"}),
    "transposed": (
        "ConvTranspose",
        (noise(4, 3, 3, 3), noise(6)),
        {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1], "group": 2},
    ),
    "matmul": ("MatMul", (noise(8, 5),), {}),
    "matmul of stacks": ("MatMul", (noise(4, 8, 5),), {}),
    "batch norm": (
        "BatchNormalization",
        (noise(4), noise(4), noise(4), np.abs(noise(4))),
        {"epsilon": 1e-3},
    ),
    "instance norm": ("InstanceNormalization", (noise(4), noise(4)), {}),
    "layer norm": ("LayerNormalization", (noise(8), noise(8)), {"epsilon": 1e-3}),
    "layer norm of two axes": ("LayerNormalization", (noise(8, 8),), {"axis": -2}),
    "group norm": (
        "GroupNormalization",
        (noise(4), noise(4)),
        {"num_groups": 2, "opset": 21},
    ),
    "prelu": ("PRelu", (noise(4, 1, 1),), {}),
    "prelu of one": ("PRelu", (noise(1),), {}),
    "prelu of columns": ("PRelu", (noise(8),), {}),
    # element by element
    "add": ("Add", (noise(4, 1, 1),), {}),
    "sub from": ("Sub", (noise(1),), {}),
    "div": ("Div", (noise(8) + 3,), {}),
    "pow": ("Pow", (np.array(2.0, np.float32),), {}),
    "min": ("Min", (np.array(0.5, np.float32), noise(8)), {}),
    "max": ("Max", (noise(8),), {}),
    "mean": ("Mean", (noise(8), noise(4, 1, 1)), {}),
    "clip": ("Clip", (np.array(-0.5, np.float32), np.array(0.7, np.float32)), {}),
    "clip at 6": ("Clip", (np.array(0.0, np.float32), np.array(6.0, np.float32)), {}),
    "clip above": ("Clip", (None, np.array(0.7, np.float32)), {}),
    "hard sigmoid": ("HardSigmoid", (), {"alpha": 0.3, "beta": 0.4}),
    "hard sigmoid, torch's": ("HardSigmoid", (), {"alpha": 1 / 6, "beta": 0.5}),
    "leaky relu": ("LeakyRelu", (), {"alpha": 0.2}),
    "elu": ("Elu", (), {"alpha": 0.7}),
    "gelu": ("Gelu", (), {"opset": 20}),
    "gelu by tanh": ("Gelu", (), {"opset": 20, "approximate": "tanh"}),
    "softmax": ("Softmax", (), {"axis": 1}),
    "softmax over a row": ("Softmax", (), {"axis": 2, "opset": 11}),
    "log softmax": ("LogSoftmax", (), {"axis": -1}),
    **{
        op: (op, (), {})
        for op in (
            *("Relu", "Sigmoid", "Tanh", "Erf", "Exp", "Neg", "Abs", "HardSwish", "Softplus"),
            *("Sin", "Cos", "Sign", "Floor", "Ceil", "Round", "Identity", "Dropout", "Reciprocal"),
            *("Selu", "Softsign"),
        )
    },
    "mish": ("Mish", (), {"opset": 18}),
    # windows
    "max pool": ("MaxPool", (), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "max pool, ceiled": (
        "MaxPool",
        (),
        {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    ),
    "max pool, uneven": ("MaxPool", (), {"kernel_shape": [2, 3], "pads": [0, 1, 1, 0]}),
    "max pool, same": (
        "MaxPool",
        (),
        {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    ),
    "max pool, dilated": ("MaxPool", (), {"kernel_shape": [3, 3], "dilations": [2, 2]}),
    "average pool": ("AveragePool", (), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    "average pool, counting": (
        "AveragePool",
        (),
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1},
    ),
    "average pool, ceiled": (
        "AveragePool",
        (),
        {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    ),
    "average pool, uneven": ("AveragePool", (), {"kernel_shape": [3, 3], "pads": [0, 1, 1, 0]}),
    "average pool, uneven, counting": (
        "AveragePool",
        (),
        {"kernel_shape": [3, 3], "pads": [0, 1, 1, 0], "count_include_pad": 1},
    ),
    "global average": ("GlobalAveragePool", (), {}),
    "global max": ("GlobalMaxPool", (), {}),
    # reductions
    "mean by attribute": ("ReduceMean", (), {"axes": [2, 3], "keepdims": 0}),
    "mean by input": ("ReduceMean", (ints(2, 3),), {"opset": 18}),
    "mean of nothing": ("ReduceMean", (), {"noop_with_empty_axes": 1, "opset": 18}),
    "sum": ("ReduceSum", (ints(-1),), {"keepdims": 0}),
    "max by attribute": ("ReduceMax", (), {"axes": [1]}),
    "l2": ("ReduceL2", (), {"axes": [1, 2]}),
    "sum of squares": ("ReduceSumSquare", (), {"axes": [1]}),
    "log sum exp": ("ReduceLogSumExp", (), {"axes": [1]}),
    # shapes
    "concat": ("Concat", (noise(1, 2, 8, 8),), {"axis": 1, "shape": (1, 4, 8, 8)}),
    "split by input": ("Split", (ints(1, 3),), {"axis": 1, "outputs": 2}),
    "split by attribute": ("Split", (), {"split": [3, 1], "axis": 1, "outputs": 2, "opset": 11}),
    "split evenly": ("Split", (), {"axis": 2, "outputs": 2}),
    "split unevenly": ("Split", (), {"axis": 2, "outputs": 3, "num_outputs": 3, "opset": 18}),
    "reshape": ("Reshape", (ints(0, 2, 2, -1),), {}),
    "flatten": ("Flatten", (), {"axis": 2}),
    "transpose": ("Transpose", (), {"perm": [0, 2, 3, 1]}),
    "transpose two": ("Transpose", (), {"perm": [0, 1, 3, 2]}),
    "unsqueeze": ("Unsqueeze", (ints(-1, 1),), {}),
    "unsqueeze by attribute": ("Unsqueeze", (), {"axes": [2], "opset": 11}),
    "expand": ("Expand", (ints(1, 4, 8, 8),), {"shape": (1, 4, 8, 8)}),
    "tile": ("Tile", (ints(1, 2, 1, 3),), {}),
    "depth to space": ("DepthToSpace", (), {"blocksize": 2}),
    "depth to space, torch's": ("DepthToSpace", (), {"blocksize": 2, "mode": "CRD"}),
    "space to depth": ("SpaceToDepth", (), {"blocksize": 2}),
    "pad": ("Pad", (ints(0, 0, 1, 2, 0, 0, 3, 0), np.array(0.5, np.float32)), {}),
    "pad, cropping": ("Pad", (ints(0, 0, -1, 2, 0, 0, 3, -2),), {}),
    "pad, reflecting": ("Pad", (ints(0, 0, 1, 2, 0, 0, 3, 0),), {"mode": "reflect"}),
    "pad, edge": ("Pad", (ints(0, 0, 1, 2, 0, 0, 3, 0),), {"mode": "edge"}),
    "pad of axes": ("Pad", (ints(1, 2), None, ints(3)), {"opset": 18}),
    # looking up
    "slice": ("Slice", (ints(1, -4), ints(3, 9999), ints(1, 3)), {}),
    "slice by steps": ("Slice", (ints(0), ints(8), ints(2), ints(3)), {}),
    "slice backwards": ("Slice", (ints(-1), ints(-(2**62)), ints(3), ints(-2)), {}),
    "gather one": ("Gather", (np.array(-1, np.int64),), {"axis": 1}),
    "gather a few": ("Gather", (ints(2, 0, -1),), {"axis": 2}),
    "gather neighbors": ("Gather", (ints(1, 2),), {"axis": 2}),
    "gather in two": ("Gather", (np.array([[0, 1], [3, -1]]),), {"axis": 1}),
    "triangle": ("Trilu", (np.array(1, np.int64),), {"upper": 0}),
    # resizing
    "nearest": (
        "Resize",
        (None, np.array([1, 1, 2, 2], np.float32)),
        {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    ),
    "nearest, uneven": (
        "Resize",
        (None, np.array([1, 1, 1.5, 0.5], np.float32)),
        {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    ),
    "nearest, half pixel": ("Resize", (None, np.array([1, 1, 3, 2], np.float32)), {}),
    "linear": ("Resize", (None, np.array([1, 1, 1.5, 2], np.float32)), {"mode": "linear"}),
    "linear, smaller": (
        "Resize",
        (None, np.array([1, 1, 0.5, 0.5], np.float32)),
        {"mode": "linear"},
    ),
    "linear to a size": (
        "Resize",
        (None, None, ints(1, 4, 13, 5)),
        {"mode": "linear", "shape": (1, 4, 8, 8)},
    ),
    "linear of axes": (
        "Resize",
        (None, None, ints(13, 5)),
        {"mode": "linear", "axes": [2, 3], "opset": 18},
    ),
    "linear, corners": (
        "Resize",
        (None, np.array([1, 1, 2, 2], np.float32)),
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
    ),
    "cubic": (
        "Resize",
        (None, np.array([1, 1, 2, 2], np.float32)),
        {"mode": "cubic"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_operator_is_the_same_as_in_the_runtime(case: str, tmp_path: Path) -> None:
    op, constants, settings = CASES[case]
    fixed = settings.get("shape", ("n",))[0] == 1
    path = write(tmp_path / "op.onnx", op, constants, **settings)
    if fixed:
        _check_one_by_one(path)
    else:
        check(path)


def _check_one_by_one(path: Path) -> None:
    session = onnxruntime.InferenceSession(path)
    x = noise(3, 4, 8, 8)
    theirs = np.concatenate([session.run(None, {"x": x[i : i + 1]})[0] for i in range(3)])
    with torch.no_grad():
        ours = load_onnx(path)(torch.from_numpy(x)).numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("op", "constants", "settings", "told"),
    [
        ("MaxPool", (), {"kernel_shape": [2, 2], "outputs": 2}, "Indices"),
        ("Squeeze", (), {}, "without axes"),
        ("Resize", (None, np.array([1, 1, 0.5, 0.5], np.float32)), {}, "nearest"),
        ("Resize", (None, np.array([1, 2, 2, 2], np.float32)), {}, "height and width"),
        (
            "Resize",
            (None, np.array([1, 1, 2, 2], np.float32)),
            {"mode": "linear", "coordinate_transformation_mode": "asymmetric"},
            "asymmetric",
        ),
        (
            "ConvTranspose",
            (noise(4, 3, 3, 3),),
            {"pads": [0, 1, 1, 0], "strides": [2, 2]},
            "uneven pads",
        ),
    ],
)
def test_refuses_a_form_that_is_not_covered(
    op: str, constants: tuple[Any, ...], settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "op.onnx", op, constants, **settings)
    with pytest.raises(BadInput, match=f"{op} 'the_node', .*{told}.*is not supported"):
        load_onnx(path)(torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize(
    ("op", "inputs", "settings"),
    [
        ("ConstantOfShape", [ints(10**6, 10**6)], {}),
        ("Range", [np.array(each, np.int64) for each in (0, 10**12, 1)], {}),
        ("Tile", [noise(1, 1), ints(10**6, 10**6)], {}),
    ],
)
def test_a_few_bytes_do_not_fill_the_memory(
    op: str, inputs: list[Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    names = [f"k{index}" for index in range(len(inputs))]
    constants = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(each))
        for name, each in zip(names, inputs, strict=True)
    ]
    huge = helper.make_node(op, names, ["huge"], name="bomb")
    path = write(tmp_path / "op.onnx", "Identity", between=(*constants, huge))
    model = onnx.load(path)
    model.graph.output.append(helper.make_tensor_value_info("huge", TensorProto.FLOAT, None))
    onnx.save(model, path)
    with pytest.raises(BadInput, match=f"{op} 'bomb', which makes a tensor of 1,000,000,000,000"):
        load_onnx(path)
