"""Which layers of an INT8 file a runtime really runs on integers, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from slimdown.core import LayerAudit
from slimdown.targets.onnx_passes import CONVS, PRODUCTS, initializers, precision_of, producers

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

FLOAT_WEIGHT = "its weight is not quantized"
FLOAT_INPUT = "its input is not quantized"
TWO_ACTIVATIONS = "both operands are activations"
NO_KERNEL = "quantized in the file, but the runtime took no INT8 kernel for it"
NOT_FOUND = "the runtime's graph does not name it: fused into another kernel, or folded"

Operand = Literal["int8 weight", "int8", "weight", "activation"]

MOVES = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Max"})
"""Operators that leave a value on the grid it was on; a maximum is our own fence."""

ON_LEVELS = frozenset({"Clip", "Cast"})
"""Operators that levels of fewer than 8 bits meet."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel that multiplies, in the graph that a runtime made of a file."""

    names: tuple[str, ...]
    """The file's nodes that it was made of; the runtime may have lengthened their names."""
    precision: str


def audit_layers(model: ModelProto, kernels: Iterable[Kernel]) -> tuple[LayerAudit, ...]:
    """Tell of each convolution and matrix product of an INT8 file in which precision it runs.

    Empty for a file without INT8 weights.
    """
    if precision_of(model) != "int8":
        return ()
    layers = [node for node in model.graph.node if node.op_type in PRODUCTS]
    precisions = _find_precisions({node.name for node in layers}, kernels)
    return tuple(
        LayerAudit(
            name=node.name,
            operator="conv" if node.op_type in CONVS else "matmul",
            precision=(precision := precisions.get(node.name, "unknown")),
            reason=None if precision == "int8" else reason,
        )
        for node, reason in zip(layers, _reasons(model, layers, precisions), strict=True)
    )


def layer_behind(value: str, writers: Mapping[str, NodeProto]) -> str | None:
    """The layer whose kernel is named after a value: that which writes it, a fused one between."""
    node = writers.get(value)
    while node is not None and node.op_type not in PRODUCTS:
        node = writers.get(node.input[0])
    return None if node is None else str(node.name)


def name_reasons(
    audit: Iterable[LayerAudit], kept_float: Mapping[str, str]
) -> tuple[LayerAudit, ...]:
    """Say why a layer's weight was not quantized, where quantization told it: layer -> why."""
    return tuple(
        replace(layer, reason=kept_float.get(layer.name, layer.reason))
        if layer.reason == FLOAT_WEIGHT
        else layer
        for layer in audit
    )


def _find_precisions(layers: set[str], kernels: Iterable[Kernel]) -> dict[str, str]:
    """The precision of each layer's kernel. One that bears the very name wins over longer ones."""
    found: dict[str, str] = {}
    for kernel in kernels:
        for name in kernel.names:
            owner = _owner(name, layers)
            if owner == name:
                found[owner] = kernel.precision
            elif owner is not None:
                found.setdefault(owner, kernel.precision)
    return found


def _owner(name: str, layers: set[str]) -> str | None:
    """The layer that a runtime's name stands for: "conv1" of "conv1_token_3", "conv1/Add"."""
    ends = [index for index, sign in enumerate(name) if sign in "/_"]
    starts = (name[:end] for end in [len(name), *reversed(ends)])
    return next((start for start in starts if start in layers), None)


def _reasons(
    model: ModelProto, layers: list[NodeProto], precisions: Mapping[str, str]
) -> list[str]:
    """Why each layer would run in float, as far as the file tells."""
    writers, constants = producers(model.graph), set(initializers(model.graph))
    return [
        NOT_FOUND
        if node.name not in precisions
        else _reason([_operand(name, writers, constants) for name in node.input[:2]])
        for node in layers
    ]


def _reason(operands: list[Operand]) -> str:
    if not any(each in ("weight", "int8 weight") for each in operands):
        return TWO_ACTIVATIONS
    if "weight" in operands:
        return FLOAT_WEIGHT
    return FLOAT_INPUT if "activation" in operands else NO_KERNEL


def _operand(name: str, writers: Mapping[str, NodeProto], constants: set[str]) -> Operand:
    """What a layer reads: a constant or not, as levels or in float."""
    is_levels = False
    while (node := writers.get(name)) is not None:
        if node.op_type == "DequantizeLinear":
            is_levels = True
        elif node.op_type not in MOVES and not (is_levels and node.op_type in ON_LEVELS):
            break
        name = node.input[0]
    if name in constants:
        return "int8 weight" if is_levels else "weight"
    return "int8" if is_levels else "activation"
