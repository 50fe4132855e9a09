"""ONNX Runtime on the CPU."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimdown.core import Artifact, Predict, Task
from slimdown.errors import BadInput, first_line
from slimdown.targets.artifact import to_array, write_artifact
from slimdown.targets.audit import Kernel, audit_layers, layer_behind
from slimdown.targets.onnx import INPUT, Dialect, to_onnx
from slimdown.targets.onnx_passes import producers

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto
    from onnxruntime import InferenceSession, SessionOptions

_ERROR = 3  # of ONNX Runtime's log levels
FLOAT16 = 10  # of ONNX's tensor types

DIALECT = Dialect(int32_biases=True, weight_zero_points=True, fences=True, least_channels=16)


@dataclass(frozen=True, kw_only=True)
class OnnxRuntime:
    """Exports one ONNX file and runs it on the CPU."""

    @property
    def name(self) -> str:
        return "onnxruntime"

    @property
    def profile(self) -> str:
        return "onnxruntime-x86"

    def check(self) -> str:
        """The installed version; it is one of slimdown's own requirements."""
        import onnxruntime

        return str(onnxruntime.__version__)

    def export(self, model: nn.Module, task: Task, folder: Path) -> Artifact:
        """Write `model.onnx` with its companions and run it once. Raises BadInput."""
        proto = to_onnx(model, task.example_input, DIALECT)
        artifact = write_artifact(self.name, proto, task, folder)
        self.load(artifact)(task.example_input)
        graph = _optimized(artifact.path)
        return replace(
            artifact,
            verified="executed",
            kernels=count_kernels(graph),
            audit=audit_layers(proto, find_kernels(graph, proto.graph)),
        )

    def load(self, artifact: Artifact, *, num_threads: int = 1) -> Predict:
        return _Predictor(_open(artifact.path, num_threads))


@dataclass(frozen=True)
class _Predictor:
    """(N, C, H, W) -> one output, or a tuple where the network has several."""

    session: InferenceSession

    def __call__(self, inputs: Tensor) -> Any:
        array = to_array(inputs)
        outputs = [torch.from_numpy(output) for output in self.session.run(None, {INPUT: array})]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def count_kernels(graph: GraphProto) -> dict[str, int]:
    """How many kernels compute in which precision, in the graph the runtime made of a file."""
    return dict(sorted(Counter(precision for _, precision in _computing(graph)).items()))


def find_kernels(graph: GraphProto, source: GraphProto) -> list[Kernel]:
    """The kernels that multiply, in the graph the runtime made of `source`."""
    writers = producers(source)
    return [
        Kernel(names=(_source_name(node, writers),), precision=precision)
        for node, precision in _computing(graph)
        if node.op_type not in ELEMENTWISE
    ]


def _optimized(path: Path) -> GraphProto:
    """The graph that the runtime makes of a file."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = _options(num_threads=1)
        options.optimized_model_filepath = str(optimized)
        _start(path, options)
        return onnx.load(optimized).graph


def _computing(graph: GraphProto) -> Iterator[tuple[NodeProto, str]]:
    """The kernels that do arithmetic, and in which precision."""
    halves = {constant.name for constant in graph.initializer if constant.data_type == FLOAT16}
    for node in graph.node:
        if node.op_type in KERNELS:
            yield node, "float16" if halves.intersection(node.input) else KERNELS[node.op_type]


def _source_name(node: NodeProto, writers: Mapping[str, NodeProto]) -> str:
    """The name of the layer in the file: kernels of the blocked layout are named after values."""
    name = str(node.name)
    if not name.endswith(BLOCKED):
        return name
    return layer_behind(name.removesuffix(BLOCKED), writers) or name


# The kernels that do a network's arithmetic, and the precision in which ONNX Runtime does it. Those
# of its blocked layout bear the plain names.
KERNELS = {
    **dict.fromkeys(("Conv", "FusedConv", "ConvTranspose", "NhwcFusedConv"), "float32"),
    **dict.fromkeys(("Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Add", "Mul"), "float32"),
    **dict.fromkeys(("Attention", "MultiHeadAttention"), "float32"),
    **dict.fromkeys(("QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul"), "int8"),
    **dict.fromkeys(("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"), "int8"),
    **dict.fromkeys(("QLinearAdd", "QLinearMul"), "int8"),
}
ELEMENTWISE = frozenset({"Add", "Mul", "QLinearAdd", "QLinearMul"})
BLOCKED = "_nchwc"


def _open(path: Path, num_threads: int) -> InferenceSession:
    return _start(path, _options(num_threads))


def _options(num_threads: int) -> SessionOptions:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = _ERROR
    return options


def _start(path: Path, options: SessionOptions) -> InferenceSession:
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of a dozen kinds, none of which it exports
        raise BadInput(
            f"ONNX Runtime cannot run this model: {first_line(error)}; "
            "keep the operator named there out of its forward, or its input in float32"
        ) from error
