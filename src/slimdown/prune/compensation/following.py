"""What follows a layer, up to the point where its output is judged.

A layer should be right where it counts: after the batch norm or layer scale, after the sum with a
skip connection, after the activation. Judged there, it makes good for what the skip connection
has lost, and need not be right where the activation lets nothing through (Zhang 2015,
arXiv:1505.06798, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from slimdown.capture.analysis import find_tensor
from slimdown.capture.call import arguments_of, operator_name

BATCH_NORM = "aten::batch_norm"
IDENTITIES = frozenset(f"aten::{name}" for name in ("alias", "clone", "contiguous", "dropout"))
"""Operators that change nothing in eval mode."""
SUMS = frozenset({"aten::add", "aten::add_"})
PRODUCTS = frozenset({"aten::mul", "aten::mul_"})
ACTIVATIONS = frozenset(
    f"aten::{name}{suffix}"
    for name in (
        "elu",
        "gelu",
        "hardswish",
        "hardtanh",
        "leaky_relu",
        "mish",
        "relu",
        "relu6",
        "silu",
    )
    for suffix in ("", "_")
)
"""Of slopes that are about one wherever something passes; sigmoids would be learned too slowly."""


@dataclass(frozen=True, kw_only=True)
class Following:
    """The output y (N, K) of a layer goes on as activation(scale * y + shift + skip)."""

    scale: Tensor
    """(K,)"""
    shift: Tensor
    """(K,)"""
    skip: Node | None = None
    activation: Callable[[Tensor], Tensor] | None = None

    def add_up(self, y: Tensor, skip: Tensor | None) -> Tensor:
        """What goes into the activation."""
        total = self.scale.to(y) * y + self.shift.to(y)
        return total if skip is None else total + skip

    def activate(self, total: Tensor) -> Tensor:
        # Of a copy: some operators overwrite their input.
        return total if self.activation is None else self.activation(total.clone())

    def unscale(self, difference: Tensor) -> Tensor:
        """The change of y that makes a difference behind the scale; none where that is zero."""
        least = 1e-6 * self.scale.abs().max().clamp_min(1e-30)
        factor = torch.where(self.scale.abs() > least, 1 / self.scale, 0)
        return difference * factor.to(difference)


def find_following(
    graph_module: GraphModule,
    node: Node,
    num_channels: int,
    *,
    is_known: Callable[[Node], bool],
) -> Following:
    """What follows the layer `node` as far as it is understood and nothing else reads between.

    `is_known` tells whether the values of a node are at hand, in the layer's shape.
    """
    ones = torch.ones(num_channels, dtype=torch.float64)
    found = Following(scale=ones, shift=torch.zeros_like(ones))
    while len(node.users) == 1:
        (user,) = node.users
        after = _pass_through(graph_module, found, node, user, is_known)
        if after is None:
            break
        found, node = after, user
        if found.activation is not None:
            break
    return found


def _pass_through(
    graph_module: GraphModule,
    found: Following,
    node: Node,
    user: Node,
    is_known: Callable[[Node], bool],
) -> Following | None:
    if not isinstance(user.target, torch._ops.OpOverload):
        return None
    name = operator_name(user)
    if name in IDENTITIES:
        return found
    if name in ACTIVATIONS:
        return replace(found, activation=_bind_activation(user))
    if found.skip is not None:
        return None
    if name in SUMS:
        other = _other_operand(user, node)
        plain = other is not None and arguments_of(user).get("alpha", 1) == 1
        return replace(found, skip=other) if plain and other and is_known(other) else None
    if is_batch_norm(user):
        return _after_norm(graph_module, found, user)
    if name in PRODUCTS:
        other = _other_operand(user, node)
        factor = None if other is None else _tensor(graph_module, other)
        return None if factor is None else _scaled(found, factor)
    return None


def _other_operand(user: Node, node: Node) -> Node | None:
    arguments = arguments_of(user)
    others = [arguments[key] for key in ("self", "other") if arguments[key] is not node]
    return others[0] if len(others) == 1 and isinstance(others[0], Node) else None


def _bind_activation(user: Node) -> Callable[[Tensor], Tensor]:
    call, rest, named = user.target, user.args[1:], dict(user.kwargs)
    assert isinstance(call, torch._ops.OpOverload)
    return lambda value: call(value, *rest, **named)


def _after_norm(graph_module: GraphModule, found: Following, norm: Node) -> Following | None:
    arguments = arguments_of(norm)
    mean, variance, weight, bias = (
        _tensor(graph_module, arguments[name])
        for name in ("running_mean", "running_var", "weight", "bias")
    )
    if mean is None or variance is None:
        return None
    factor = (variance + arguments["eps"]).rsqrt()
    factor = factor if weight is None else factor * weight
    shift = -mean * factor if bias is None else bias - mean * factor
    return Following(scale=found.scale * factor, shift=found.shift * factor + shift)


def _scaled(found: Following, factor: Tensor) -> Following | None:
    if factor.numel() not in (1, found.scale.numel()):
        return None
    factor = factor.flatten()
    return Following(scale=found.scale * factor, shift=found.shift * factor)


def _tensor(graph_module: GraphModule, node: object) -> Tensor | None:
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    return find_tensor(graph_module, str(node.target)).detach().double().cpu()


# -------------------------------------------------------------------------------- constants


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The tensor of the state that takes up a layer's constant output, and with which sign."""

    name: str
    sign: int


def find_constant(node: Node, uses: Mapping[str, int]) -> Constant | None:
    """A layer's own bias or, without one, the running mean of the batch norm that reads it.

    None where there is neither, or where others use it too: see `count_uses`.
    """
    bias = arguments_of(node).get("bias")
    if bias is not None:
        return _own(bias, uses, sign=1)
    norms = [user for user in node.users if is_batch_norm(user)]
    if len(norms) == len(node.users) == 1:
        return _own(arguments_of(norms[0])["running_mean"], uses, sign=-1)
    return None


def is_batch_norm(node: Node) -> bool:
    """Whether a node is a batch norm in eval mode."""
    is_call = isinstance(node.target, torch._ops.OpOverload)
    return is_call and operator_name(node) == BATCH_NORM and not arguments_of(node)["training"]


def _own(node: object, uses: Mapping[str, int], *, sign: int) -> Constant | None:
    if isinstance(node, Node) and node.op == "get_attr" and uses.get(str(node.target)) == 1:
        return Constant(name=str(node.target), sign=sign)
    return None


def count_uses(graph_module: GraphModule) -> dict[str, int]:
    """How many calls read each tensor of the state, by all of its names."""
    names: dict[int, list[str]] = {}
    for name, tensor in chain(
        graph_module.named_parameters(remove_duplicate=False),
        graph_module.named_buffers(remove_duplicate=False),
    ):
        names.setdefault(id(tensor), []).append(name)
    uses = {name: 0 for same in names.values() for name in same}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.target in uses:
            for name in names[id(find_tensor(graph_module, node.target))]:
                uses[name] += len(node.users)
    return uses
