"""An ONNX file -> a module of torch's own layers, which everything else then works on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimdown.errors import BadInput
from slimdown.load.onnx.batch import free_batch_
from slimdown.load.onnx.call import Call, Unsupported
from slimdown.load.onnx.fusions import fuse
from slimdown.load.onnx.layers import MAKERS, Layer, as_in, find_layer, pad_window
from slimdown.load.onnx.module import Held, OnnxModule, Source, Step, refusal, to_tensor
from slimdown.load.onnx.names import is_made_up, layer_path, place_
from slimdown.load.onnx.numbers import as_value, row
from slimdown.load.onnx.ops import TABLE
from slimdown.load.onnx.reader import DEFAULT_DOMAINS, OnnxGraph, OnnxNode, read_onnx

NUM_SHOWN = 4


def load_onnx(path: Path) -> OnnxModule:
    """Load a file as a module in eval mode that takes any batch size.

    Raises BadInput for a file that cannot be used, naming the operator or the tensor.
    """
    graph = read_onnx(path)
    _refuse_unknown(graph)
    with torch.no_grad():
        module = _Importer(fuse(graph)).run()
        free_batch_(module.eval())
    return module


def _refuse_unknown(graph: OnnxGraph) -> None:
    unknown = {
        node.op: node
        for node in reversed(graph.nodes)
        if node.domain not in DEFAULT_DOMAINS or node.op not in TABLE.keys() | MAKERS.keys()
    }
    if unknown:
        named = [str(node) for node in reversed(unknown.values())]
        rest = f" and {len(named) - NUM_SHOWN} more" if len(named) > NUM_SHOWN else ""
        raise BadInput(
            f"{graph.path} has operators that are not supported: {', '.join(named[:NUM_SHOWN])}"
            f"{rest}. Export the network without them, such as without post-processing and before "
            "any optimization for one runtime; or give the model in Python"
        )


class _Importer:
    """The state of one import: what is constant so far, and the steps."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self.module = OnnxModule(
            file=str(graph.path),
            opset=graph.opset,
            input_name=graph.input,
            input_shape=graph.input_shape,
        )
        self.constants = dict(graph.constants)
        self.origins = {name: name for name in graph.constants}
        self.uses = Counter(name for node in graph.nodes for name in node.inputs)
        self.uses.update(graph.outputs)
        self.parameters: dict[tuple[str, bool], nn.Parameter] = {}
        self.held: dict[str, Held] = {}
        self.steps: list[Step] = []

    def run(self) -> OnnxModule:
        for node in self.graph.nodes:
            self._add(node)
        outputs = self.graph.outputs
        computed = {name for step in self.steps for name in step.outputs}
        idle = [name for name in outputs if name not in computed]
        if idle:
            raise BadInput(
                f"{self.graph.path}: the output {idle[0]!r} does not depend on the image: export "
                "the network again, or cut the output off"
            )
        self.module.steps = tuple(_without_idle(self.steps, outputs))
        self.module.outputs = outputs
        return self.module

    def _add(self, node: OnnxNode) -> None:
        try:
            self._translate(node)
        except Unsupported as error:
            raise refusal(self.graph.path, str(node), error) from error

    def _translate(self, node: OnnxNode) -> None:
        if all(name in self.constants for name in node.inputs if name):
            self._fold(node)
        elif self._is_bias(node):
            self._add_bias_(node)
        else:
            layer = find_layer(node, self.constants)
            if layer is not None:
                self._add_layer(node, layer)
            elif node.op in TABLE:
                self._add_call(node)
            else:
                raise Unsupported("whose weights the network computes")

    # ------------------------------------------------------------------------------ constants

    def _fold(self, node: OnnxNode) -> None:
        """Compute what depends on constants alone, once and for all."""
        if node.op not in TABLE:
            raise Unsupported("of constants alone")
        inputs = tuple(
            self._constant(node.op, index, name) if name else None
            for index, name in enumerate(node.inputs)
        )
        call = Call(node.op, self.graph.opset, inputs, node.attributes, len(node.outputs))
        try:
            results = TABLE[node.op](call)
        except Unsupported:
            raise
        except Exception as error:  # whatever torch says of shapes and types that do not fit
            raise BadInput(
                f"{self.graph.path}: {node} cannot be computed: {error}. The file is damaged: "
                "export it again"
            ) from error
        results = results if type(results) in (tuple, list) else (results,)
        for name, result in zip(node.outputs, results, strict=False):
            self.constants[name] = to_tensor(result)
            if node.inputs and node.op in ("Transpose", "Identity", "Cast", "Reshape"):
                self.origins[name] = self.origins.get(node.inputs[0], "")

    def _constant(self, op: str, index: int, name: str) -> Any:
        tensor = self.constants[name]
        if op == "Resize" and index > 0:
            return row(tensor.reshape(-1).tolist())
        return as_value(tensor)

    def _hold(self, name: str) -> Held:
        """Make a constant a parameter where it has a name of the user's, and a buffer else."""
        if name not in self.held:
            tensor, origin = self.constants[name], self.origins.get(name, "")
            is_trained = tensor.is_floating_point() and not is_made_up(origin)
            item = nn.Parameter(tensor) if is_trained else tensor
            self.held[name] = Held(place_(self.module, origin or name, item))
        return self.held[name]

    # ---------------------------------------------------------------------------------- steps

    def _add_call(self, node: OnnxNode) -> None:
        self._append(node, TABLE[node.op], tuple(self._sources(node)))

    def _append(self, node: OnnxNode, call: Any, inputs: tuple[Source, ...]) -> None:
        self.steps.append(Step(str(node), node.op, call, inputs, node.outputs, node.attributes))

    def _sources(self, node: OnnxNode) -> Iterator[Source]:
        for index, name in enumerate(node.inputs):
            if not name:
                yield None
            elif name in self.constants:
                value = self._constant(node.op, index, name)
                yield self._hold(name) if isinstance(value, Tensor) else value
            else:
                yield name

    def _add_layer(self, node: OnnxNode, layer: Layer) -> None:
        for place, name in layer.tensors.items():
            self._give_(layer, place, name)
        weight = next(iter(layer.tensors.values()), "")
        path = layer_path(node.op, node.name, self.origins.get(weight, ""), scope=node.scope)
        path = place_(self.module, path, layer.module)
        image = node.inputs[0]
        if layer.pads is not None:
            padded = f"{node.outputs[0]} padded"
            pads = Step(str(node), node.op, pad_window, (image,), (padded,), layer.pads)
            self.steps.append(pads)
            image = padded
        self._append(node, path, (image,))

    def _give_(self, layer: Layer, place: str, name: str) -> None:
        """Put a constant into a layer. Matrices that several layers read stay one and the same.

        Rows do not: exporters merge biases that happen to be equal.
        """
        tensor = as_in(layer, place, self.constants[name])
        if place.startswith("running"):
            layer.module.register_buffer(place, tensor.clone())
            return
        key = (name, layer.is_transposed)
        parameter = self.parameters.get(key) if tensor.ndim > 1 else None
        parameter = nn.Parameter(tensor.clone()) if parameter is None else parameter
        self.parameters[key] = parameter
        layer.module.register_parameter(place, parameter)

    def _is_bias(self, node: OnnxNode) -> bool:
        """Whether this adds a row to what nothing but it reads of a linear layer without bias."""
        linear = self._linear_before(node)
        if node.op != "Add" or linear is None:
            return False
        row = self._row_of(node)
        return row is not None and row.shape == (linear.out_features,)

    def _linear_before(self, node: OnnxNode) -> nn.Linear | None:
        for step in reversed(self.steps):
            if step.outputs[0] in node.inputs and isinstance(step.call, str):
                module = self.module.get_submodule(step.call)
                is_bare = isinstance(module, nn.Linear) and module.bias is None
                return module if is_bare and self.uses[step.outputs[0]] == 1 else None  # type: ignore[return-value]
        return None

    def _row_of(self, node: OnnxNode) -> Tensor | None:
        return next((self.constants[each] for each in node.inputs if each in self.constants), None)

    def _add_bias_(self, node: OnnxNode) -> None:
        linear, bias = self._linear_before(node), self._row_of(node)
        assert linear is not None
        assert bias is not None
        linear.bias = nn.Parameter(bias.clone())
        place = next(i for i, step in enumerate(self.steps) if step.outputs[0] in node.inputs)
        self.steps[place] = replace(self.steps[place], outputs=node.outputs)


def _without_idle(steps: list[Step], outputs: tuple[str, ...]) -> list[Step]:
    """The steps that the outputs depend on, each with what is read there for the last time."""
    needed = set(outputs)
    kept: list[Step] = []
    for step in reversed(steps):
        if needed.isdisjoint(step.outputs):
            continue
        reads = {source for source in step.inputs if isinstance(source, str)}
        kept.append(replace(step, last_reads=tuple(sorted(reads - needed))))
        needed |= reads
    return kept[::-1]
