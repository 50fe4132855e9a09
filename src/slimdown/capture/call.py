"""One operator call of a graph, as the rules of the op table see it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from slimdown.capture.dims import Dim, freeze_

Shape: TypeAlias = tuple[Dim, ...]
"""The dims of one tensor."""

KeptSize: TypeAlias = Callable[[Dim], int]
"""How many channels of a dim are left once the graph is pruned."""

BATCH = "batch"
SPATIAL = "spatial"
KERNEL = "kernel"
"""Reasons of dims that are no channels; all other reasons name what forbids pruning."""


class Unsupported(Exception):
    """A rule does not cover this form of its operator; what the call touches is frozen."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Arguments of one node that tell sizes: how they read once the graph is pruned."""

    node: Node
    arguments: Callable[[KeptSize], Mapping[str, Any]]
    """New arguments by name; those that are missing stay. All of them where `target` changes."""
    target: torch._ops.OpOverload | None = None
    """The operator that takes the node's place, where its own cannot say the new sizes."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A weight that makes channels out of others."""

    name: str
    """That of its module, such as "layer1.0.conv1"."""
    weight: str
    """That of the tensor, such as "layer1.0.conv1.weight"."""
    output: Dim
    """The channels that it makes."""


class Call:
    """The arguments of `node` by name, the dims of its inputs, and what a rule finds out."""

    def __init__(self, node: Node, shapes: Mapping[Node, Shape]) -> None:
        self.node = node
        self.edits: list[Edit] = []
        self.costs: list[Shape] = []
        self.layers: list[Layer] = []
        self.ties: list[Shape] = []
        self.spared: list[Dim] = []
        self.mixes_channels = False
        self._shapes = shapes
        self._arguments = arguments_of(node)

    @property
    def name(self) -> str:
        """The operator without its namespace and overload, such as "conv2d"."""
        return operator_name(self.node).split("::")[-1]

    # ------------------------------------------------------------------------ reading arguments

    @property
    def names(self) -> Collection[str]:
        """The names of the arguments that this overload has."""
        return self._arguments.keys()

    def argument(self, name: str) -> Any:
        if name not in self._arguments:
            raise Unsupported
        return self._arguments[name]

    def integer(self, name: str) -> int:
        value = self.argument(name)
        if not isinstance(value, int):
            raise Unsupported
        return value

    def integers(self, name: str) -> list[int]:
        value = self.argument(name)
        values = [value] if isinstance(value, int) else value
        if not isinstance(values, Sequence) or not all(isinstance(v, int) for v in values):
            raise Unsupported
        return list(values)

    def axis(self, name: str, ndim: int) -> int:
        """An axis argument, counted from the front."""
        if ndim == 0:  # torch takes axes of a scalar, too
            raise Unsupported
        return self.integer(name) % ndim

    def axes(self, ndim: int) -> set[int]:
        """The axes that `dim` or `dims` lists, counted from the front; all where it lists none."""
        name = next((name for name in ("dim", "dims") if name in self._arguments), None)
        given = [] if name is None or self._arguments[name] is None else self.integers(name)
        return {axis % ndim for axis in given if ndim} or set(range(ndim))  # scalars have none

    def shape(self, name: str) -> Shape:
        """The dims of a tensor argument."""
        shape = self.optional_shape(name)
        if shape is None:
            raise Unsupported
        return shape

    def optional_shape(self, name: str) -> Shape | None:
        """The dims of a tensor argument; None where it was not given."""
        return self.shape_of(self._arguments.get(name))

    def shape_of(self, value: object) -> Shape | None:
        """The dims of a tensor in a list of arguments; None for anything else."""
        return self._shapes.get(value) if isinstance(value, Node) else None

    def operands(self) -> tuple[Shape, Shape]:
        """The dims of the first two arguments, which are tensors."""
        a, b = list(self._arguments)[:2]
        return self.shape(a), self.shape(b)

    def is_parameter(self, value: object) -> bool:
        """Whether an argument, or that of this name, is a tensor of the state, maybe reshaped."""
        node = self.argument(value) if isinstance(value, str) else value
        while isinstance(node, Node) and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        return isinstance(node, Node) and node.op == "get_attr"

    def is_boolean(self, value: object) -> bool:
        """Whether an argument is a tensor of truth values."""
        tensor = value.meta.get("val") if isinstance(value, Node) else None
        return isinstance(tensor, Tensor) and tensor.dtype == torch.bool

    def list_of_shapes(self, name: str) -> list[Shape]:
        """The dims of an argument that is a list of tensors."""
        values = self.argument(name)
        if not values or not all(value in self._shapes for value in values):
            raise Unsupported
        return [self._shapes[value] for value in values]

    def input_shapes(self) -> list[Shape]:
        """The dims of all tensors among the arguments."""
        return [self._shapes[node] for node in self.node.all_input_nodes if node in self._shapes]

    # ------------------------------------------------------------------------- the node's output

    @property
    def has_several_outputs(self) -> bool:
        return isinstance(self.node.meta.get("val"), list | tuple)

    def output_sizes(self) -> list[int]:
        """The sizes of the only output."""
        value = self.node.meta.get("val")
        if not isinstance(value, Tensor):
            raise Unsupported
        return sizes_of(value)

    def outputs_sizes(self) -> list[list[int]]:
        """The sizes of each of several outputs."""
        values = self.node.meta.get("val")
        if not isinstance(values, list | tuple):
            raise Unsupported
        return [sizes_of(value) for value in values]

    def is_symbolic(self, axis: int) -> bool:
        """Whether the output's size along `axis` depends on the batch size."""
        return not isinstance(self.node.meta["val"].shape[axis], int)

    # -------------------------------------------------------------------- telling what was found

    def edit(self, argument: str, value: Callable[[KeptSize], Any]) -> None:
        """Tell how an argument reads in the pruned graph."""
        self.edits.append(Edit(node=self.node, arguments=lambda size: {argument: value(size)}))

    def edit_sizes(self, argument: str, output: Shape, *, first: int = 0) -> None:
        """Tell that an argument lists the sizes of the output from axis `first` on, as in `view`.

        A size that depends on the batch becomes -1 where it changes, so only one of them may.
        """
        given = self.argument(argument)
        dims = output[first : first + len(given)]
        symbolic = [self.is_symbolic(first + index) for index in range(len(dims))]
        if sum(symbolic) > 1:
            for dim in (dim for dim, depends in zip(dims, symbolic, strict=True) if depends):
                freeze_(dim, BATCH)

        def new_size(value: Any, dim: Dim, depends: bool, size: KeptSize) -> Any:
            if size(dim) != dim.size:
                return -1 if depends else size(dim)
            return dim.size if value == -1 and not depends else value

        self.edit(
            argument,
            lambda size: [
                new_size(value, dim, depends, size)
                for value, dim, depends in zip(given, dims, symbolic, strict=True)
            ],
        )

    def replace(
        self, target: torch._ops.OpOverload, arguments: Callable[[KeptSize], Mapping[str, Any]]
    ) -> None:
        """Tell which call takes this one's place in the pruned graph."""
        self.edits.append(Edit(node=self.node, arguments=arguments, target=target))

    def cost(self, *dims: Dim) -> None:
        """Tell that the call does as many multiply-accumulates as the product of these dims."""
        self.costs.append(dims)

    def layer(self, weight: object, output: Dim) -> None:
        """Tell that `weight`, an argument or the name of one, makes the channels `output`."""
        source = _source(self.argument(weight) if isinstance(weight, str) else weight)
        if source is not None:
            module, _, tensor = source.rpartition(".")
            self.layers.append(Layer(name=module or tensor, weight=source, output=output))

    def tie(self, *dims: Dim) -> None:
        """Tell that the call says the sizes of these dims by one number, so they had better agree.

        Not a demand: the pruned graph can say different sizes. The module it came from cannot.
        """
        self.ties.append(dims)

    def spare(self, *dims: Dim) -> None:
        """Tell that these dims had better stay whole: their size is more than a number of channels.

        A norm averages over them, or the module computes a scale from their size. Not a demand.
        """
        self.spared += dims

    def mix(self) -> None:
        """Tell that an output depends on several channels other than by a weight of each.

        Of such an operator (a norm, a product of activations), removing channels is not the same
        as zeroing them: it sees the kept ones only.
        """
        self.mixes_channels = True


def operator_name(node: Node) -> str:
    """The operator with its namespace but without overload: "aten::conv2d"."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return str(node.target._schema.name)


def arguments_of(node: Node) -> dict[str, Any]:
    """The arguments of an operator call by name, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args):
            arguments[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            arguments[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            arguments[argument.name] = argument.default_value
    return arguments


def modules_of(node: Node) -> list[str]:
    """The names of the modules whose forward ran an operator, the innermost last.

    "" is the root; "blocks@1" is the second call of `blocks`.
    """
    return [str(name) for name, _ in node.meta.get("nn_module_stack", {}).values()]


def module_of(node: Node) -> str:
    """The name of the innermost module, whichever call of it; "" for the root, or unknown."""
    return ["", *modules_of(node)][-1].partition("@")[0]


def sizes_of(tensor: Tensor) -> list[int]:
    """The sizes of a tensor; where they depend on the batch, those of the captured example.

    Raises Unsupported where a size depends on the values of tensors.
    """
    sizes = [size if isinstance(size, int) else size.node.hint for size in tensor.shape]
    if any(size is None for size in sizes):
        raise Unsupported
    return [int(size) for size in sizes]


def _source(node: Any) -> str | None:
    """The name of the tensor that a weight was computed from, such as by a fake quantization."""
    while isinstance(node, Node) and node.op == "call_function" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return str(node.target) if isinstance(node, Node) and node.op == "get_attr" else None
