"""A rule of the op table by itself: one operator, on tensors whose dims are all free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_map

from slimdown.capture import Analysis
from slimdown.capture.call import Call, Shape
from slimdown.capture.dims import Dim, Kept, Var, is_frozen, kept_size, leaves
from slimdown.capture.ops import find_rule


@dataclass(frozen=True)
class Applied:
    """What a rule made of a call."""

    call: Call
    inputs: list[Shape]
    output: Any

    def edited(self, widths: Mapping[Var, int]) -> dict[str, Any]:
        """The arguments that change, once the leaves have these widths."""

        def size(dim: Dim) -> int:
            return kept_size(dim, widths)

        new: dict[str, Any] = {}
        for edit in self.call.edits:
            new.update(edit.arguments(size))
        return new


@pytest.fixture
def apply() -> Callable[..., Applied]:
    """`apply(op, *args, **kwargs)`: the rule of `op`, called as `op` would be.

    With a `reason`, the dims of the inputs are frozen.
    """

    def run(op: Any, *args: Any, reason: str | None = None, **kwargs: Any) -> Applied:
        graph, shapes = Graph(), dict[Node, Shape]()

        def declare(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            node = graph.placeholder(f"x{len(shapes)}")
            node.meta["val"] = value
            shapes[node] = tuple(Var(size, reason) for size in value.shape)
            return node

        node_args, node_kwargs = tree_map(declare, (args, kwargs))
        inputs = list(shapes.values())
        node = graph.call_function(op, node_args, node_kwargs)
        node.meta["val"] = op(*args, **kwargs)
        rule = find_rule(node)
        assert rule is not None, f"no rule for {op}"
        call = Call(node, shapes)
        output = rule(call)
        for shape, value in zip(
            output if isinstance(output, list) else [output],
            node.meta["val"] if isinstance(output, list) else [node.meta["val"]],
            strict=True,
        ):
            assert [dim.size for dim in shape] == list(value.shape)
        return Applied(call=call, inputs=inputs, output=output)

    return run


@pytest.fixture
def random_choice() -> Callable[[Analysis, torch.Generator], Kept]:
    """`random_choice(analysis, generator)`: a part of every free leaf, never nothing of it."""

    def choose(analysis: Analysis, generator: torch.Generator) -> Kept:
        shapes = [*analysis.shapes.values(), *analysis.tensors.values()]
        found = dict.fromkeys(leaf for shape in shapes for dim in shape for leaf in leaves(dim))
        kept = {}
        for leaf in (leaf for leaf in found if not is_frozen(leaf)):
            kept[leaf] = torch.rand(leaf.size, generator=generator) < 0.6
            kept[leaf][torch.randint(leaf.size, (), generator=generator)] = True
        return kept

    return choose


@pytest.fixture
def zeros() -> Callable[..., Tensor]:
    return torch.zeros
