"""Layer norms and GELUs that an exporter took apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from slimdown.load.onnx import load_onnx
from slimdown.load.onnx.module import OnnxModule

ROOT = float(np.sqrt(2))

GELUS = {
    "the older exporter's": """
        a = Div(x, root)
        b = Erf(a)
        c = Add(b, one)
        d = Mul(x, c)
        y = Mul(d, half)""",
    "the newer exporter's": """
        a = Div(x, root)
        b = Erf(a)
        c = Add(b, one)
        d = Mul(half, c)
        y = Mul(x, d)""",
    "half of x first": """
        a = Mul(inverse, x)
        b = Erf(a)
        c = Add(one, b)
        h = Mul(x, half)
        y = Mul(h, c)""",
}
OTHERS = {
    "another root": GELUS["half of x first"].replace("inverse", "root"),
    "another factor": GELUS["the newer exporter's"].replace("half", "root"),
    "another summand": GELUS["the newer exporter's"].replace("one", "half"),
    "another value": GELUS["the newer exporter's"].replace("Mul(x, d)", "Mul(a, d)"),
    "also read elsewhere": GELUS["the newer exporter's"].replace("Mul(x, d)", "Sub(c, d)"),
}
NORM = """
    m = ReduceMean(x)
    c = Sub(x, m)
    p = Pow(c, two)
    v = ReduceMean(p)
    e = Add(v, eps)
    s = Sqrt(e)
    q = Div(c, s)
    g = Mul(q, w)
    y = Add(g, bias)"""


def read(text: str, path: Path, *, axes: tuple[int, ...] = (-1,)) -> Path:
    """Write a file of lines such as `y = Add(a, b)`."""
    rng = np.random.default_rng(0)
    constants = {
        **{"root": ROOT, "inverse": 1 / ROOT, "one": 1.0, "half": 0.5, "two": 2.0, "eps": 1e-3},
        **{name: rng.normal(size=6) for name in ("w", "bias")},
    }
    nodes = []
    for line in text.strip().splitlines():
        output, _, call = line.strip().partition(" = ")
        op, _, inputs = call.rstrip(")").partition("(")
        settings = {"axes": axes} if op == "ReduceMean" else {}
        nodes.append(helper.make_node(op, inputs.split(", "), [output], **settings))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.asarray(value, np.float32), name)
            for name, value in constants.items()
        ],
    )
    opsets = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def check(path: Path) -> OnnxModule:
    module = load_onnx(path)
    x = torch.randn(3, 4, 6, 6)
    (theirs,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    with torch.no_grad():
        assert np.abs(module(x).numpy() - theirs).max() < 1e-5 * np.abs(theirs).max()
    return module


def operators(module: OnnxModule) -> list[str]:
    return [step.op for step in module.steps]


@pytest.mark.parametrize("form", GELUS)
def test_a_gelu_is_one_again(form: str, tmp_path: Path) -> None:
    assert operators(check(read(GELUS[form], tmp_path / "net.onnx"))) == ["Gelu"]


@pytest.mark.parametrize("form", OTHERS)
def test_what_only_looks_like_a_gelu_stays(form: str, tmp_path: Path) -> None:
    assert "Erf" in operators(check(read(OTHERS[form], tmp_path / "net.onnx")))


def test_a_layer_norm_is_one_again(tmp_path: Path) -> None:
    module = check(read(NORM, tmp_path / "net.onnx"))
    assert operators(module) == ["LayerNormalization"]
    assert sorted(tensor.numel() for tensor in module.parameters()) == [6, 6]


@pytest.mark.parametrize(
    ("old", "new", "axes"),
    [
        ("", "", (2,)),
        ("", "", (-1, -2)),
        ("Sub(x, m)", "Sub(m, x)", (-1,)),
        ("Pow(c, two)", "Mul(c, x)", (-1,)),
        ("Div(c, s)", "Div(x, s)", (-1,)),
        ("Add(v, eps)", "Add(v, w)", (-1,)),
    ],
)
def test_what_only_looks_like_a_layer_norm_stays(
    old: str, new: str, axes: tuple[int, ...], tmp_path: Path
) -> None:
    text = NORM.replace(old, new) if old else NORM
    path = read(text, tmp_path / "net.onnx", axes=axes)
    assert "Sqrt" in [step.op for step in load_onnx(path).steps]
