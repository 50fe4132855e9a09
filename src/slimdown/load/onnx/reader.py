"""An ONNX file -> its graph, after every check that can be made without running it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    checker,
    defs,
    helper,
    inliner,
    load_model_from_string,
    numpy_helper,
)
from torch import Tensor

from slimdown.errors import BadInput, first_line

OLDEST_OPSET = 11
LARGEST_BYTES = 2**31 - 1
"""Of a protocol buffer; larger networks keep their weights in a file beside it."""
IMAGE_NDIM = 4
HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
SCOPES = "pkg.torch.onnx.name_scopes"
QUANTIZED = (
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "QLinear",
    "ConvInteger",
    "MatMulInteger",
    "QGemm",
    "QAttention",
)
"""How the names of operators on integers begin."""
DEFAULT_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class OnnxNode:
    """One operator call. An input that was left out is ""."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    domain: str
    scope: str = ""
    """The path of the module that it was exported from, where the exporter says so."""

    def __str__(self) -> str:
        op = self.op if self.domain in DEFAULT_DOMAINS else f"{self.domain}::{self.op}"
        return f"{op} {self.name!r}" if self.name else f"{op} that makes {self.outputs[0]!r}"


@dataclass(frozen=True)
class OnnxGraph:
    """The graph of a file, in the order in which it is computed."""

    path: Path
    opset: int
    input: str
    input_shape: tuple[int | None, ...]
    """(N, C, H, W) as the file says it; None is any size."""
    outputs: tuple[str, ...]
    constants: dict[str, Tensor]
    nodes: tuple[OnnxNode, ...]


def read_onnx(path: Path) -> OnnxGraph:
    """Read a file and its external data. Raises BadInput for what cannot be used, and why.

    External data is read from the file's own folder only: a file from elsewhere could otherwise
    name any file of this machine.
    """
    model = _parse(path)
    opset = _opset(model, path)
    if model.functions:
        model = inliner.inline_local_functions(model)
    graph = model.graph
    _refuse_quantized(graph, path)
    _refuse_halves(graph, path)
    name, shape = _image_input(graph, path)
    return OnnxGraph(
        path=path,
        opset=opset,
        input=name,
        input_shape=shape,
        outputs=tuple(output.name for output in graph.output),
        constants={each.name: to_tensor(each, path) for each in graph.initializer},
        nodes=tuple(_node(each, path) for each in graph.node),
    )


def to_tensor(tensor: TensorProto, path: Path) -> Tensor:
    """Copy a tensor out of the file; floating numbers become float32."""
    try:
        array = np.array(numpy_helper.to_array(tensor))
        value = torch.from_numpy(array)
    except (ValueError, TypeError, KeyError) as error:
        kind = TensorProto.DataType.Name(tensor.data_type)
        raise BadInput(
            f"{path}: the tensor {tensor.name!r} ({kind}, {tuple(tensor.dims)}) cannot be read: "
            f"{error}. The file is damaged, or holds a type that images need not: export it again"
        ) from error
    return value.float() if value.is_floating_point() else value


# ------------------------------------------------------------------------------------ the file


def _parse(path: Path) -> ModelProto:
    if not path.is_file():
        raise BadInput(f"there is no file {path}")
    num_bytes = path.stat().st_size
    if num_bytes > LARGEST_BYTES:
        raise BadInput(
            f"{path} has {num_bytes / 2**30:.1f} GB, and ONNX files end at 2 GB: save it with its "
            "weights beside it, onnx.save(model, file, save_as_external_data=True)"
        )
    try:
        model = load_model_from_string(path.read_bytes())
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    except Exception as error:  # protobuf's own kinds
        raise BadInput(
            f"{path} is damaged or no ONNX file: {first_line(error).rstrip('.')}. Export or fetch "
            "it again"
        ) from error
    num_bytes += sum(_read_external_(tensor, path) for tensor in _tensors(model.graph))
    if num_bytes <= LARGEST_BYTES:  # the checker takes no more
        _check(model, path)
    return model


def _check(model: ModelProto, path: Path) -> None:
    for output in model.graph.output:  # which the checker asks for, and nobody needs
        output.type.tensor_type.shape.SetInParent()
    try:
        checker.check_model(model)
    except Exception as error:  # the checker's own kinds
        raise BadInput(
            f"{path} is damaged, or not what ONNX allows: {first_line(error).rstrip('.')}. Export "
            "it again"
        ) from error


def _opset(model: ModelProto, path: Path) -> int:
    versions = {each.domain: each.version for each in model.opset_import}
    opset = next((versions[domain] for domain in DEFAULT_DOMAINS if domain in versions), None)
    newest = defs.onnx_opset_version()
    if opset is None:
        raise BadInput(f"{path} uses no operators of ONNX: it imports {sorted(versions)}")
    if not OLDEST_OPSET <= opset <= newest:
        raise BadInput(
            f"{path} is of opset {opset}, and {OLDEST_OPSET} to {newest} can be read: export it "
            f"with opset_version=17, or convert it, onnx.version_converter.convert_version(model, "
            "17)"
        )
    return int(opset)


def _refuse_quantized(graph: GraphProto, path: Path) -> None:
    for node in graph.node:
        if node.op_type.startswith(QUANTIZED):
            raise BadInput(
                f"{path} is quantized already: it has {_node_label(node)}. Give the float32 file "
                "that it was made from"
            )


def _refuse_halves(graph: GraphProto, path: Path) -> None:
    tensors = [each for each in graph.initializer if each.data_type in HALVES]
    inputs = [each for each in graph.input if each.type.tensor_type.elem_type in HALVES]
    if tensors or inputs:
        raise BadInput(
            f"{path} holds float16: {(*tensors, *inputs)[0].name!r}. Give the float32 file that it "
            "was made from; `precision: float16` makes a half of it again"
        )


def _image_input(graph: GraphProto, path: Path) -> tuple[str, tuple[int | None, ...]]:
    held = {each.name for each in graph.initializer}  # old files list their weights as inputs, too
    inputs = [each for each in graph.input if each.name not in held]
    if len(inputs) != 1:
        names = ", ".join(each.name for each in inputs) or "none"
        raise BadInput(
            f"{path} has {len(inputs)} inputs ({names}), and a network of images has one: cut the "
            "others off, onnx.utils.extract_model(file, out, [image], outputs), or make them "
            "constants"
        )
    (image,) = inputs
    tensor_type = image.type.tensor_type
    if tensor_type.elem_type != TensorProto.FLOAT:
        kind = TensorProto.DataType.Name(tensor_type.elem_type)
        raise BadInput(
            f"{path}: the input {image.name!r} is {kind}, and images are fed as FLOAT after "
            "data.preprocess: export the network without the conversion and scaling in front"
        )
    dims = tensor_type.shape.dim
    shape = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in dims)
    if len(shape) != IMAGE_NDIM:
        raise BadInput(
            f"{path}: the input {image.name!r} has {len(shape)} dimensions, and images have "
            f"{IMAGE_NDIM}, (N, C, H, W): export it with an image as its example"
        )
    return image.name, shape


def _node(node: NodeProto, path: Path) -> OnnxNode:
    attributes = {each.name: _attribute(each, path) for each in node.attribute}
    names = tuple(node.input), tuple(node.output)
    return OnnxNode(node.op_type, node.name, *names, attributes, node.domain, _scope(node))


def _scope(node: NodeProto) -> str:
    """Of "['', 'layer1', 'layer1.0', 'conv2d']", an operator in its modules, the innermost module.

    torch's newer exporter writes this.
    """
    told = {each.key: each.value for each in node.metadata_props}.get(SCOPES, "")
    *modules, _ = re.findall(r"'([\w.]*)'", told) or [""]
    return modules[-1] if modules else ""


def _attribute(attribute: AttributeProto, path: Path) -> Any:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, TensorProto):
        return to_tensor(value, path)
    return value


def _node_label(node: NodeProto) -> str:
    return f"{node.op_type} {node.name!r}" if node.name else node.op_type


# ------------------------------------------------------------------------------- external data


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _read_external_(tensor: TensorProto, path: Path) -> int:
    """Put the bytes that a tensor keeps in another file into the tensor; return how many."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return 0
    told = {entry.key: entry.value for entry in tensor.external_data}
    file = _beside(told.get("location", ""), tensor, path)
    try:
        offset = int(told.get("offset", 0))
        length = int(told.get("length", file.stat().st_size - offset))
        if offset < 0 or length < 0 or offset + length > file.stat().st_size:
            raise BadInput(
                f"{path}: the weights of {tensor.name!r} are bytes {offset} to {offset + length} "
                f"of {file.name}, which has {file.stat().st_size}: the two do not belong together, "
                "or one is not whole"
            )
        with file.open("rb") as stream:
            stream.seek(offset)
            tensor.raw_data = stream.read(length)
    except (OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: the weights of {tensor.name!r} cannot be read: {error}") from error
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]
    return length


def _beside(location: str, tensor: TensorProto, path: Path) -> Path:
    folder = path.parent.resolve()
    try:
        file = (folder / location).resolve()
        is_inside = file.is_relative_to(folder) and not Path(location).is_absolute()
    except (OSError, ValueError, RuntimeError):  # a null byte, a loop of links
        is_inside = False
    if not location or not is_inside:
        raise BadInput(
            f"refused {path}: it keeps the weights of {tensor.name!r} in {location!r}, outside of "
            "its own folder, and could so read any file of this machine. Save it with its weights "
            "beside it: onnx.save(model, file, save_as_external_data=True)"
        )
    if not file.is_file():
        raise BadInput(
            f"{path} keeps its weights in {location}, which is missing beside it: copy both files"
        )
    return file
