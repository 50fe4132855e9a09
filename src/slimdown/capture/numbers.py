"""Dims that a module's code says by one number, and that had better keep equal sizes therefore."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch.fx import Node

from slimdown.capture.call import Shape, arguments_of, module_of, operator_name
from slimdown.capture.dims import Dim, is_frozen, is_same

_RESHAPES = {"aten::view", "aten::reshape", "aten::_unsafe_view"}


def find_shared_numbers(shapes: Mapping[Node, Shape]) -> Iterator[Shape]:
    """The dims to which the reshapes of one module give the same number in the same place.

    Such as the head width, where queries, keys and values are projected and reshaped one by one:
    `q.view(n, length, -1, self.head_dim)`. That one number is meant is a guess: see `Call.tie`.
    """
    said: dict[tuple[str, int, int], list[Dim]] = {}
    for node, shape in shapes.items():
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if operator_name(node) not in _RESHAPES:
            continue
        module, numbers = module_of(node), _numbers(node)
        for place, (number, dim) in enumerate(zip(numbers, shape, strict=True) if numbers else ()):
            if number == dim.size > 1 and not is_frozen(dim):
                said.setdefault((module, place - len(shape), dim.size), []).append(dim)
    for dims in said.values():
        apart = [dim for dim in dims[1:] if not is_same(dims[0], dim)]
        if apart:
            yield (dims[0], *apart)


def _numbers(node: Node) -> list[object]:
    """The sizes that a reshape was told: numbers, and nodes where they depend on the batch.

    None in `x.view(dtype)`.
    """
    arguments = arguments_of(node)
    return list(arguments.get("size", arguments.get("shape", ())))
