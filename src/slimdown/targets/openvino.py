"""OpenVINO on the CPU, which opens an ONNX file as it is.

The file is ONNX and not OpenVINO's own format: the text half of that spells out the shape of every
tensor (160 KB for an INT8 ResNet-20 whose weights take 277 KB), and numbers its nodes anew in each
process, so that equal models do not give equal files.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimdown.core import Artifact, Predict, Task
from slimdown.errors import BadInput, MissingExtra
from slimdown.targets.artifact import to_array, write_artifact
from slimdown.targets.audit import Kernel, audit_layers, layer_behind
from slimdown.targets.onnx import Dialect, to_onnx
from slimdown.targets.onnx_passes import producers

if TYPE_CHECKING:
    from onnx import GraphProto

DIALECT = Dialect(int32_biases=False, weight_zero_points=False, fences=False, least_channels=1)


@dataclass(frozen=True, kw_only=True)
class OpenVino:
    """Exports one ONNX file and runs it on the CPU, float parts in float32."""

    @property
    def name(self) -> str:
        return "openvino"

    @property
    def profile(self) -> str:
        return "openvino"

    def check(self) -> str:
        """The installed version, such as "2026.4.1". Raises MissingExtra."""
        return str(_import_openvino().get_version()).split("-")[0]

    def export(self, model: nn.Module, task: Task, folder: Path) -> Artifact:
        """Write `model.onnx` with its companions and run it once. Raises BadInput, MissingExtra."""
        proto = to_onnx(model, task.example_input, DIALECT)
        artifact = write_artifact(self.name, proto, task, folder)
        compiled = _compile(artifact.path, num_threads=1)
        _Predictor(compiled.create_infer_request())(task.example_input)
        return replace(
            artifact,
            verified="executed",
            kernels=count_kernels(compiled),
            audit=audit_layers(proto, find_kernels(compiled, proto.graph)),
        )

    def load(self, artifact: Artifact, *, num_threads: int = 1) -> Predict:
        return _Predictor(_compile(artifact.path, num_threads).create_infer_request())


@dataclass(frozen=True)
class _Predictor:
    """(N, C, H, W) -> one output, or a tuple where the network has several."""

    request: Any  # an openvino.InferRequest

    def __call__(self, inputs: Tensor) -> Any:
        array = to_array(inputs)
        # Copied: the runtime writes the next outputs into the same memory.
        results = self.request.infer([array], share_inputs=True, share_outputs=False)
        outputs = [torch.from_numpy(output) for output in results.to_tuple()]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def count_kernels(compiled: Any) -> dict[str, int]:
    """How many kernels compute in which precision, in the graph that the runtime made."""
    found = (p for kind, p, _ in _describe_kernels(compiled) if kind in MULTIPLYING | {"Eltwise"})
    return dict(sorted(Counter(found).items()))


def find_kernels(compiled: Any, source: GraphProto) -> list[Kernel]:
    """The kernels that multiply, in the graph that the runtime made of `source`."""
    writers = producers(source)
    # The runtime names a kernel that writes an output of the network after that.
    last = {output.name: layer_behind(output.name, writers) for output in source.output}
    return [
        Kernel(names=tuple(last.get(name) or name for name in names), precision=precision)
        for kind, precision, names in _describe_kernels(compiled)
        if kind in MULTIPLYING or kind in FUSED
    ]


def _describe_kernels(compiled: Any) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Of each kernel its kind, its precision where that is one of ours, and its nodes' names."""
    keys = ("layerType", "runtimePrecision", "originalLayersNames")
    for node in compiled.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        kind, precision, names = (facts[key].astype(str) for key in keys)
        if precision in PRECISIONS:
            yield kind, PRECISIONS[precision], tuple(names.split(","))


MULTIPLYING = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul"})
"""The kinds of kernels that do a network's arithmetic; sums are mostly fused into those."""

FUSED = frozenset({"Subgraph", "ScaledDotProductAttention"})
"""The kinds that hold several operators, products perhaps among them."""

PRECISIONS = {
    "u8": "int8",
    "i8": "int8",
    "f16": "float16",
    "bf16": "bfloat16",
    "f32": "float32",
}


def _compile(path: Path, num_threads: int) -> Any:
    """Compile for the least latency on `num_threads` threads."""
    openvino = _import_openvino()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": num_threads,
        # bfloat16, the default where the CPU has it, is 10 to 35 dB away from float32.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    try:
        return openvino.Core().compile_model(str(path), "CPU", settings)
    except RuntimeError as error:
        cause = " ".join(str(error).split())[:300]
        raise BadInput(
            f"OpenVINO cannot run this model: {cause}; keep the operator named there out of its "
            "forward"
        ) from error


def _import_openvino() -> Any:
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise MissingExtra("openvino", "openvino") from error
