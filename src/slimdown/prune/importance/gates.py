"""Derivatives by gates: what closing a channel does to a loss, to the first order.

A gate is a factor on a channel, just before a layer reads it. To close the gates of a channel in
front of all layers that read it is to remove the channel, so the derivative by them tells what
removal does, for all weights of the group together. Molchanov 2019, arXiv:1906.10771, section 3;
Liu 2021, arXiv:2108.00708, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from math import prod
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from slimdown.capture import Analysis
from slimdown.capture.call import Shape, arguments_of, operator_name
from slimdown.capture.dims import Cat, Dim, Prod, Var, is_frozen, leaves, resolve, rows_of_leaves
from slimdown.core import Batch
from slimdown.errors import RecipeError
from slimdown.prune.probe import require_finite
from slimdown.prune.running import Run
from slimdown.prune.sites import Site

Loss: TypeAlias = Callable[[Any, Batch], Tensor]
"""Outputs and their batch -> the sum of the samples' losses."""


PRODUCTS = {
    "aten::scaled_dot_product_attention": "query",
    "aten::matmul": "self",
    "aten::bmm": "self",
}
"""Products of activations that sum over the last axis of one operand, which is named here."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A factor on the channels of one tensor, in front of one operator or behind its own."""

    node: Node
    """The operator."""
    point: Node
    """The tensor: an operand of `node`, or what it gives."""
    axis: int
    """Of the channels."""
    dim: Dim
    closes_to: Literal["mean", "zero"]
    """What is let through by a closed gate in front of a layer, which can have the mean of what is
    missing in its bias, and by one elsewhere."""

    @property
    def on_output(self) -> bool:
        return self.point is self.node


def find_gates(analysis: Analysis, sites: Sequence[Site]) -> dict[Var, list[Gate]]:
    """The gates of each leaf: in front of what reads it or, failing that, behind what makes it.

    Layers read it, and products of activations that sum over it: a gate on one factor will do. None
    where samples do not have an axis, as in a layer that turns a table into position biases.
    """
    on_input: dict[Var, list[Gate]] = {}
    on_output: dict[Var, list[Gate]] = {}
    for site in sites:
        if _can_have_gate(analysis, site.input, site.axis):
            gate = Gate(
                node=site.node, point=site.input, axis=site.axis, dim=site.reads, closes_to="mean"
            )
            for leaf in site.read_leaves:
                on_input.setdefault(leaf, []).append(gate)
        if _can_have_gate(analysis, site.node, site.axis):
            gate = Gate(
                node=site.node, point=site.node, axis=site.axis, dim=site.makes, closes_to="zero"
            )
            for leaf in dict.fromkeys(leaves(site.makes)):
                on_output.setdefault(leaf, []).append(gate)
    for gate in _find_products(analysis, {site.node for site in sites}):
        for leaf in dict.fromkeys(leaves(gate.dim)):
            on_input.setdefault(leaf, []).append(gate)
    found = {**on_output, **on_input}
    return {leaf: gates for leaf, gates in found.items() if not is_frozen(leaf)}


def _find_products(analysis: Analysis, layers: Collection[Node]) -> Iterator[Gate]:
    for node in analysis.graph_module.graph.nodes:
        is_operator = isinstance(node.target, torch._ops.OpOverload)
        if not is_operator or node in layers or operator_name(node) not in PRODUCTS:
            continue
        point = arguments_of(node)[PRODUCTS[operator_name(node)]]
        if _can_have_gate(analysis, point, -1):
            dim = analysis.shapes[point][-1]
            yield Gate(node=node, point=point, axis=-1, dim=dim, closes_to="zero")


def _can_have_gate(analysis: Analysis, point: Node, axis: int) -> bool:
    """Whether samples have an axis there, other than that of the channels."""
    shape = analysis.shapes.get(point, ())
    place = _batch_axis(shape, analysis.batch_size)
    return place is not None and place[0] != axis % len(shape)


@dataclass(frozen=True, kw_only=True)
class Derivatives:
    """Of each sample's loss by a group's gates, over the samples; (C,) each, in float64."""

    mean_abs: Tensor
    mean_square: Tensor


def differentiate(
    analysis: Analysis,
    gates: Mapping[Var, Sequence[Gate]],
    batches: Iterable[Batch],
    loss: Loss,
    *,
    means: Mapping[Node, Tensor],
) -> dict[Var, Derivatives]:
    """The derivatives of each sample's loss by the gates of each leaf. Raises RecipeError.

    A gate that closes to the mean lets through the (C,) values that `means` has for its point, and
    zeros where there are none. Gates on inputs close together, so that their derivatives add up.
    Behind several makers each tells of all that follows, so that theirs are averaged.
    """
    gated = _Gated(analysis, list(dict.fromkeys(chain.from_iterable(gates.values()))), means)
    absolute = {leaf: torch.zeros(leaf.size, dtype=torch.float64) for leaf in gates}
    square = {leaf: torch.zeros(leaf.size, dtype=torch.float64) for leaf in gates}
    count = 0
    for batch in batches:
        by_gate = gated.differentiate(batch, loss)
        count += len(batch.inputs)
        for leaf, several in gates.items():
            shares = torch.stack([_share(leaf, gate.dim, by_gate[gate]) for gate in several])
            derivative = shares.mean(0) if several[0].on_output else shares.sum(0)
            absolute[leaf] += derivative.abs().sum(1)
            square[leaf] += derivative.square().sum(1)
    return {
        leaf: Derivatives(mean_abs=absolute[leaf] / count, mean_square=square[leaf] / count)
        for leaf in gates
    }


def _share(leaf: Var, dim: Dim, derivative: Tensor) -> Tensor:
    """The part of (N, dim.size) derivatives that belongs to a leaf, (leaf.size, N)."""
    parts = [rows for each, rows in rows_of_leaves(dim, derivative.T) if each is leaf]
    by_sample = [rows.reshape(leaf.size, -1, len(derivative)).sum(1) for rows in parts]
    return torch.stack(by_sample).sum(0)


class _Gated(Run):
    """Runs a graph with all gates open, and differentiates by them."""

    def __init__(
        self, analysis: Analysis, gates: Sequence[Gate], means: Mapping[Node, Tensor]
    ) -> None:
        super().__init__(analysis.graph_module)
        self.analysis = analysis
        self.means = means
        self.on_input = {gate.node: gate for gate in gates if not gate.on_output}
        self.on_output = {gate.node: gate for gate in gates if gate.on_output}
        self.num_samples = 0
        self.factors: dict[Gate, Tensor] = {}

    def differentiate(self, batch: Batch, loss: Loss) -> dict[Gate, Tensor]:
        """The derivative of each sample's loss by each gate, (N, C) in float64."""
        self.num_samples, self.factors = len(batch.inputs), {}
        with torch.enable_grad():
            outputs = self.run(batch.inputs)
            require_finite(outputs)
            total = loss(outputs, batch)
            if not total.requires_grad:
                raise RecipeError(
                    "prune.importance asks for derivatives, which this network's outputs do not "
                    "have; choose one that asks for none, such as 'wanda'"
                )
            factors = list(self.factors.values())
            found = torch.autograd.grad(total, factors, allow_unused=True)
        return {
            gate: (torch.zeros_like(factor) if each is None else each).double().cpu()
            for gate, factor, each in zip(self.factors, factors, found, strict=True)
        }

    def run_node(self, n: Node) -> Any:
        if n in self.on_input:
            point = self.on_input[n].point
            value = self.env[point]
            self.env[point] = self._multiply(self.on_input[n], value)
            result = super().run_node(n)
            self.env[point] = value  # each reader has a gate of its own
        else:
            result = super().run_node(n)
        return self._multiply(self.on_output[n], result) if n in self.on_output else result

    def _multiply(self, gate: Gate, value: Tensor) -> Tensor:
        """Put a factor of one on each channel of each sample."""
        if _is_overwritten(gate.point):
            value = value.clone()  # the derivative is by the value as it is now
        factor = value.new_ones(self.num_samples, gate.dim.size).requires_grad_()
        self.factors[gate] = factor
        place = _batch_axis(self.analysis.shapes[gate.point], self.analysis.batch_size)
        assert place is not None
        batch_axis, num_neighbors = place
        axis = gate.axis % value.ndim
        rows = torch.arange(value.shape[batch_axis], device=value.device) // num_neighbors
        spread = factor[rows % self.num_samples]
        shape = [1] * value.ndim
        shape[batch_axis], shape[axis] = spread.shape
        spread = (spread if batch_axis < axis else spread.T).reshape(shape)
        if gate.closes_to == "zero" or gate.point not in self.means:
            return value * spread
        shape[batch_axis] = 1
        closed = self.means[gate.point].to(value).reshape(shape)
        return closed + (value - closed) * spread


def _batch_axis(shape: Shape, batch_size: int) -> tuple[int, int] | None:
    """Along which axis the samples lie, and how many neighbors there belong to one.

    None for what is the same for all samples.
    """
    for axis, dim in enumerate(shape):
        if dim.size == 0 or dim.size % batch_size != 0:  # of a dynamic batch: a prime
            continue
        samples = resolve(dim)
        if isinstance(samples, Cat):  # one batch after the other
            return axis, 1
        num_outer = 1
        if isinstance(samples, Prod):  # windows of images, or the tokens of all samples
            outer = takewhile(lambda factor: factor.size % batch_size != 0, samples.factors)
            num_outer = prod(factor.size for factor in outer)
        return axis, dim.size // batch_size // num_outer
    return None


def _is_overwritten(node: Node) -> bool:
    """Whether an operator changes the node's value in place."""
    operators = (user.target for user in node.users)
    names = (op._schema.name for op in operators if isinstance(op, torch._ops.OpOverload))
    return any(name.endswith("_") for name in names)
