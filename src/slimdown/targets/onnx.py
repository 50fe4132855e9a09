"""A module as one self-contained ONNX file: the way-point of every runtime that reads ONNX.

`torch.onnx.export` writes the graph, with our fake quantizers as QuantizeLinear/DequantizeLinear;
small passes make it what a runtime expects.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from slimdown.capture import export_any_batch
from slimdown.core import batch_device
from slimdown.errors import BadInput, SlimdownError
from slimdown.quantize import PER_CHANNEL, PER_TENSOR, FakeQuantizePerChannel
from slimdown.targets.onnx_passes import (
    copy_shared_transposes_,
    drop_weight_zero_points_,
    fence_float_layers_,
    fold_quantized_weights_,
    name_layers_,
    pack_narrow_weights_,
    quantize_biases_,
    strip_,
)
from slimdown.targets.widen import widen_narrow_convs_

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 20
OPSET_OF_INT4 = 21
INPUT, OUTPUT = "input", "output"
"""The names in the file; a further output bears the name of the operator that computes it."""
MAX_BYTES = 2**31 - 2**20
"""A protobuf ends at 2 GiB; the rest is the graph's."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How a runtime wants the INT8 layers of an ONNX file written."""

    int32_biases: bool
    """Biases as int32 levels; ONNX Runtime has no INT8 Gemm without."""
    weight_zero_points: bool
    """Zero points of weights, all zero, spelled out. ONNX Runtime's INT8 MatMul wants them; one
    that several layers share keeps OpenVINO from running them in INT8."""
    fences: bool
    """Whether float layers are kept from being quantized by the runtime itself."""
    least_channels: int
    """Below this, an INT8 convolution is padded with channels of zeros, since that is faster."""


def to_onnx(model: nn.Module, example_input: Tensor, dialect: Dialect) -> ModelProto:
    """Export `model` in eval mode, checked, with a dynamic batch; weights and all in one proto.

    Raises BadInput for a model beyond 2 GiB or that the exporter cannot write.
    """
    import onnx

    _check_size(model)
    opset = OPSET_OF_INT4 if _has_narrow_weights(model) else OPSET
    proto = _export(model, example_input, opset)
    fold_quantized_weights_(proto)
    copy_shared_transposes_(proto)
    if dialect.int32_biases:
        quantize_biases_(proto)
    if not dialect.weight_zero_points:
        drop_weight_zero_points_(proto)
    widen_narrow_convs_(proto, width=dialect.least_channels)
    if dialect.fences:
        fence_float_layers_(proto)
    if opset >= OPSET_OF_INT4:
        pack_narrow_weights_(proto)
    strip_(proto)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def to_bytes(model: ModelProto) -> bytes:
    """The file's content: equal models give equal bytes."""
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _check_size(model: nn.Module) -> None:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if num_bytes > MAX_BYTES:
        raise BadInput(
            f"the model's tensors take {num_bytes / 2**30:.1f} GiB, and one ONNX file holds at "
            "most 2 GiB: quantize to float16 or prune first"
        )


def _has_narrow_weights(model: nn.Module) -> bool:
    """Whether a weight fits into 4 bits."""
    weights = (each for each in model.modules() if isinstance(each, FakeQuantizePerChannel))
    return any(each.quant_min >= -8 and each.quant_max <= 7 for each in weights)


def _export(model: nn.Module, example_input: Tensor, opset: int) -> ModelProto:
    try:
        with _quiet():
            # The exporter takes attention apart, whose parts lie in memory as torch's own do only
            # without a fused kernel: a view of what one gives would not be one then.
            with sdpa_kernel(SDPBackend.MATH):
                exported = export_any_batch(model, example_input.to(batch_device(model)))
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: "batch"},),
                custom_translation_table=_translations(opset),
                verbose=False,
            )
    except SlimdownError:
        raise
    except Exception as error:  # torch.export raises many kinds
        cause = str(error.__cause__ or error).strip().splitlines()
        raise BadInput(
            "this model cannot be written as ONNX for batches of any size: "
            f"{' '.join(cause[:2])}; keep the batch size out of its forward, as in "
            "x.flatten(1), and use operators that ONNX has"
        ) from error
    assert program is not None
    assert program.exported_program is not None
    proto = program.model_proto
    name_layers_(proto, _layers_of(program.exported_program))
    return proto


def _layers_of(exported: ExportedProgram) -> dict[str, str]:
    """Operators that have a stored weight -> what users call them: "linear_2" -> "fc1"."""
    signature = exported.graph_signature
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    found = {}
    for node in exported.graph.nodes:
        if not str(node.target).startswith(("aten.conv", "aten.linear")):
            continue
        weight = node.args[1]
        while weight.op == "call_function" and isinstance(weight.args[0], Node):  # quantizers
            weight = weight.args[0]
        if weight.name in stored:
            found[node.name] = stored[weight.name].removesuffix(".weight")
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and its warnings about its own parts off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _translations(opset: int) -> dict[Any, Callable[..., Any]]:
    """How our operators are written in ONNX."""
    import onnxscript
    from onnx import helper

    op: Any = getattr(onnxscript, f"opset{opset}")

    def clip(levels: Any, quant_min: int, quant_max: int) -> Any:
        # On levels, not before them: a layer and the QuantizeLinear behind it stay one kernel.
        if (quant_min, quant_max) in ((0, 255), (-128, 127)):
            return levels
        kind = _level_type(quant_min, quant_max)
        bounds = (helper.make_tensor("", kind, (), [b]) for b in (quant_min, quant_max))
        return op.Clip(levels, *(op.Constant(value=bound) for bound in bounds))

    def per_tensor(x: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int) -> Any:
        zero = op.Cast(zero_point, to=_level_type(quant_min, quant_max))
        levels = clip(op.QuantizeLinear(x, scale, zero), quant_min, quant_max)
        return op.DequantizeLinear(levels, scale, zero)

    def per_channel(
        x: Any, scale: Any, zero_point: Any, axis: int, quant_min: int, quant_max: int
    ) -> Any:
        zero = op.Cast(zero_point, to=_level_type(quant_min, quant_max))
        levels = clip(op.QuantizeLinear(x, scale, zero, axis=axis), quant_min, quant_max)
        return op.DequantizeLinear(levels, scale, zero, axis=axis)

    return {PER_TENSOR: per_tensor, PER_CHANNEL: per_channel}


def _level_type(quant_min: int, quant_max: int) -> int:
    """The ONNX type that holds the levels; its saturation clips them where they fill it."""
    from onnx import TensorProto

    assert -128 <= quant_min < quant_max <= 255
    assert quant_min >= 0 or quant_max <= 127
    return int(TensorProto.INT8 if quant_min < 0 else TensorProto.UINT8)
