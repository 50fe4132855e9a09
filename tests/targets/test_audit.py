"""The audit against what the runtimes themselves report of kernels that they ran."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional as F

from slimdown.core import Artifact, LayerAudit, Target
from slimdown.quantize import Quantize
from slimdown.targets import find_target
from slimdown.targets.audit import (
    FLOAT_INPUT,
    FLOAT_WEIGHT,
    NO_KERNEL,
    NOT_FOUND,
    TWO_ACTIVATIONS,
    Kernel,
    audit_layers,
    name_reasons,
)
from slimdown.targets.onnx_passes import name_layers_

RUNTIMES = [
    pytest.param("onnxruntime", id="onnxruntime"),
    pytest.param("openvino", id="openvino", marks=pytest.mark.openvino),
]


class Attention(nn.Module):
    """(N, 3, 16, 16) -> (N, 4): patches, one head of attention, two linears in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, 4)
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.fc1, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).flatten(1, 2))
        return self.head((x + self.fc2(F.gelu(self.fc1(x)))).mean(1))


class Convs(nn.Module):
    """(N, 3, 16, 16) -> (N, 4): plain, depthwise, pointwise and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16)
        self.block = nn.Sequential(nn.Conv2d(16, 32, 1), nn.SiLU())
        self.up, self.head = nn.ConvTranspose2d(32, 8, 2, 2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.stem(x).relu()).relu()
        return self.head(self.up(self.block(x)).mean((2, 3)))


NETS = {"attention": Attention, "convs": Convs}


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Target:
    pytest.importorskip(request.param)
    return find_target(request.param)


def deploy(
    target: Target, model: nn.Module, task: Any, folder: Path, exclude: tuple[str, ...] = ()
) -> Artifact:
    stage = Quantize(exclude=exclude, effort="fast").for_target(target)
    return target.export(stage(model, task).model, task, folder)


def tell(audit: tuple[LayerAudit, ...]) -> dict[str, tuple[str, str, str | None]]:
    return {layer.name: (layer.operator, layer.precision, layer.reason) for layer in audit}


@pytest.mark.parametrize("target", RUNTIMES, indirect=True)
def test_layers_are_told_by_their_paths_and_attention_is_float(
    target: Target, toy_task: Any, tmp_path: Path
) -> None:
    artifact = deploy(target, Attention().eval(), toy_task, tmp_path)
    product = ("matmul", "float32", TWO_ACTIVATIONS)
    assert tell(artifact.audit) == {
        "patch": ("conv", "int8", None),
        "qkv": ("matmul", "int8", None),
        "scaled_dot_product_attention": product,
        "scaled_dot_product_attention/2": product,
        "proj": ("matmul", "int8", None),
        "fc1": ("matmul", "int8", None),
        "fc2": ("matmul", "int8", None),
        "head": ("matmul", "int8", None),
    }


@pytest.mark.parametrize("target", RUNTIMES, indirect=True)
@pytest.mark.parametrize("excluded", ["depthwise", "block.0"])
def test_an_excluded_convolution_is_float_and_alone(
    target: Target, excluded: str, toy_task: Any, tmp_path: Path
) -> None:
    audit = tell(deploy(target, Convs().eval(), toy_task, tmp_path, (excluded,)).audit)
    assert list(audit) == ["stem", "depthwise", "block.0", "up", "head"]
    floats = {name: told[1:] for name, told in audit.items() if told[1] != "int8"}
    assert floats == dict.fromkeys((excluded, "up"), ("float32", FLOAT_WEIGHT))


@pytest.mark.parametrize("target", RUNTIMES, indirect=True)
@pytest.mark.parametrize("excluded", ["fc1", "head"])
def test_an_excluded_linear_is_float(
    target: Target, excluded: str, toy_task: Any, tmp_path: Path
) -> None:
    audit = tell(deploy(target, Attention().eval(), toy_task, tmp_path, (excluded,)).audit)
    floats = {name for name, told in audit.items() if told[1] == "float32"}
    attention = {name for name in audit if name.startswith("scaled_dot_product_attention")}
    assert floats == {excluded} | attention
    assert audit[excluded][2] == FLOAT_WEIGHT


@pytest.mark.parametrize("target", RUNTIMES, indirect=True)
def test_only_int8_files_are_audited(target: Target, toy_task: Any, tmp_path: Path) -> None:
    model = Convs().eval()
    assert target.export(model, toy_task, tmp_path / "float32").audit == ()
    half = Quantize(precision="float16")(model, toy_task).model
    assert target.export(half, toy_task, tmp_path / "float16").audit == ()


@pytest.mark.parametrize("net", NETS)
def test_onnxruntime_counts_what_its_profiler_saw(net: str, toy_task: Any, tmp_path: Path) -> None:
    """The profiler writes down each kernel that really ran, by the type of its operator."""
    import onnxruntime

    artifact = deploy(find_target("onnxruntime"), NETS[net]().eval(), toy_task, tmp_path)
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(artifact.path, options)
    session.run(None, {"input": toy_task.example_input.numpy()})
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [e["args"]["op_name"] for e in events if e["name"].endswith("_kernel_time")]
    names = ("QLinearConv", "QGemm", "MatMulIntegerToFloat", "QLinearMatMul")
    is_int8 = [layer.precision == "int8" for layer in artifact.audit]
    assert sum(is_int8) == sum(name in names for name in ran)
    others = ("Conv", "ConvTranspose", "FusedConv", "Gemm", "MatMul", "FusedMatMul")
    assert len(is_int8) - sum(is_int8) == sum(name in others for name in ran)


@pytest.mark.openvino
@pytest.mark.parametrize("net", NETS)
def test_openvino_counts_what_its_profiler_saw(net: str, toy_task: Any, tmp_path: Path) -> None:
    """The profiler writes down each kernel that really ran, "brgconv_avx512_I8" and the like."""
    openvino = pytest.importorskip("openvino")
    artifact = deploy(find_target("openvino"), NETS[net]().eval(), toy_task, tmp_path)
    settings = {"PERF_COUNT": True, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(artifact.path), "CPU", settings)
    request = compiled.create_infer_request()
    request.infer([toy_task.example_input.numpy()])
    convs = {"Convolution", "GroupConvolution", "ConvolutionBackpropData"}
    ran = Counter(
        info.exec_type.rsplit("_", 1)[-1]
        for info in request.profiling_info
        if info.node_type in convs | {"FullyConnected", "MatMul"}
        and str(info.status) == "Status.EXECUTED"
    )
    found = Counter(layer.precision for layer in artifact.audit)
    assert found["int8"] == ran["I8"] > 0
    if net == "convs":  # attention is one fused kernel, which the profiler counts as no product
        assert found["float32"] == ran["f32"] == 1


def test_reasons_are_read_off_the_file() -> None:
    """A quantized weight beside a float input, a product of constants' neighbors, and so on."""
    names = ["plain", "float_input", "float_weight", "both"]
    node = helper.make_node
    model = helper.make_model(
        helper.make_graph(
            [
                node("DequantizeLinear", ["qx", "s"], ["dqx"]),
                node("Transpose", ["dqx"], ["x"]),
                node("DequantizeLinear", ["qw", "s"], ["w"]),
                node("MatMul", ["x", "w"], ["a"], name=names[0]),
                node("MatMul", ["a", "w"], ["b"], name=names[1]),
                node("MatMul", ["x", "fw"], ["c"], name=names[2]),
                node("MatMul", ["b", "c"], ["d"], name=names[3]),
            ],
            "graph",
            [helper.make_tensor_value_info("qx", TensorProto.UINT8, [2, 2])],
            [helper.make_tensor_value_info("d", TensorProto.FLOAT, [2, 2])],
            [
                helper.make_tensor("s", TensorProto.FLOAT, [], [0.1]),
                helper.make_tensor("qw", TensorProto.INT8, [2, 2], [1, 2, 3, 4]),
                helper.make_tensor("fw", TensorProto.FLOAT, [2, 2], [1, 2, 3, 4]),
            ],
        )
    )
    kernels = [Kernel(names=(f"{name}_token_3",), precision="bfloat16") for name in names]
    audit = audit_layers(model, kernels)
    assert [layer.precision for layer in audit] == ["bfloat16"] * 4
    assert [layer.reason for layer in audit] == [
        NO_KERNEL,
        FLOAT_INPUT,
        FLOAT_WEIGHT,
        TWO_ACTIVATIONS,
    ]
    lost = audit_layers(model, kernels[1:])[0]
    assert (lost.precision, lost.reason) == ("unknown", NOT_FOUND)
    ran = audit_layers(model, [Kernel(names=("plain",), precision="int8"), *kernels])[0]
    assert (ran.precision, ran.reason) == ("int8", None)  # the very name wins


def test_quantization_says_why_a_weight_stayed_float() -> None:
    told = {"conv": "excluded by the recipe", "product": "matmul stays in float"}
    audit = (
        LayerAudit(name="conv", operator="conv", precision="float32", reason=FLOAT_WEIGHT),
        LayerAudit(name="up", operator="conv", precision="float32", reason=FLOAT_WEIGHT),
        LayerAudit(name="product", operator="matmul", precision="float32", reason=TWO_ACTIVATIONS),
    )
    reasons = [layer.reason for layer in name_reasons(audit, told)]
    assert reasons == ["excluded by the recipe", FLOAT_WEIGHT, TWO_ACTIVATIONS]


class Shared(nn.Module):
    """(N, 3, 16, 16) -> (N, 4): a layer used twice, a functional one, and a whole encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.weight = nn.Linear(16, 16), nn.Parameter(torch.randn(4, 16))
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(self.twice(self.twice(x.mean(1)).relu()))
        return F.linear(x.mean(1), self.weight)


@pytest.mark.parametrize("target", RUNTIMES, indirect=True)
def test_layers_bear_the_names_that_quantization_gives_them(
    target: Target, toy_task: Any, tmp_path: Path
) -> None:
    stage = Quantize(exclude=("encoder.linear1", "*in_proj*"), effort="fast").for_target(target)
    result = stage(Shared().eval(), toy_task)
    audit = target.export(result.model, toy_task, tmp_path).audit
    int8 = {layer.name.removesuffix("/2") for layer in audit if layer.precision == "int8"}
    assert int8 == set(result.facts["quantized"])
    assert {"twice", "weight", "encoder.self_attn.out_proj", "encoder.linear2"} == int8
    why = {layer.name: layer.reason for layer in name_reasons(audit, result.facts["kept_float"])}
    assert why["encoder.linear1"] == "excluded by the recipe"
    assert why["encoder.self_attn.in_proj_weight"] == "excluded by the recipe"
    assert why["twice/2"] is None


def test_nodes_are_named_after_layers() -> None:
    def made(operator: str, path: str, name: str) -> Any:
        node = helper.make_node(operator, ["x"], ["y"], name=f"node_{name}")
        entry = node.metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.name_scopes", str(["", path, name])
        return node

    nodes = [
        made("Conv", "stem", "conv2d"),
        made("MatMul", "attn", "linear"),
        made("Add", "attn", "linear"),
        made("MatMul", "attn", "linear_1"),
        made("MatMul", "mix", "matmul"),
        made("MatMul", "", "matmul_1"),
        made("Relu", "stem", "relu"),
        helper.make_node("Conv", ["x"], ["y"], name="of_nobody"),
    ]
    model = helper.make_model(helper.make_graph(nodes, "graph", [], []))
    name_layers_(model, {"conv2d": "stem", "linear": "attn.qkv", "linear_1": "attn.qkv"})
    assert [node.name for node in model.graph.node] == [
        "stem",
        "attn.qkv",
        "attn.qkv/Add",
        "attn.qkv/2",
        "mix.matmul",
        "matmul_1",
        "node_relu",
        "of_nobody",
    ]
