"""Proof that surgery did what was planned: the pruned graph equals the masked original.

The original graph runs with the weights of every removed channel at zero, the pruned one without
them. Where they differ by more than rounding may explain, both run again in float64, which is
slow on a CPU but settles the matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from slimdown.capture import Analysis
from slimdown.capture.call import arguments_of
from slimdown.capture.dims import Kept, mask
from slimdown.prune.plan import slices_of
from slimdown.prune.probe import Probe, Replay, relative_error
from slimdown.prune.surgery import changed_arguments

TOLERANCE = 1e-5
"""Largest relative error between what must be equal."""


class Unverified(AssertionError):
    """A pruned model does not compute what it should: a bug of slimdown, never delivered."""


def check_surgery(analysis: Analysis, kept: Kept, pruned: GraphModule, probe: Probe) -> float:
    """Return the relative error of `pruned` against the masked original. Raises Unverified."""
    slices = slices_of(analysis, kept)
    # Statistics and quantization scales stay: with its weights at zero, a channel says nothing.
    weights = analysis.parameters.keys() | {layer.weight for layer in analysis.layers}
    masked = {
        name: _mask(tensor, slices.get(name, {}) if name in weights else {})
        for name, tensor in probe.state.items()
    }
    sliced = probe.sliced(slices).state
    for double in (False, True):
        original = _Masked(analysis, kept, masked, double=double)
        reference = [original.run(each) for each in probe.inputs]
        result = Replay(pruned, sliced, double=double)
        error = relative_error([result.run(each) for each in probe.inputs], reference)
        if error <= TOLERANCE:
            return error
    raise Unverified(
        f"the pruned graph differs from the masked original by {error:.2e} (relative), where "
        f"{TOLERANCE:g} is allowed; please report this model"
    )


def _mask(tensor: Tensor, axes: Mapping[int, tuple[int, ...]]) -> Tensor:
    masked = tensor.clone()
    for axis, kept in axes.items():
        gone = torch.ones(tensor.shape[axis], dtype=torch.bool)
        gone[list(kept)] = False
        masked.index_fill_(axis, gone.nonzero().flatten().to(tensor.device), 0)
    return masked


class _Masked(Replay):
    """Runs the original graph on a masked state.

    Where an operator mixes channels (a norm, a product of activations), a removed channel would
    count although it is zero; there it is taken out before and put back as zeros after.
    """

    def __init__(
        self, analysis: Analysis, kept: Kept, state: Mapping[str, Tensor], *, double: bool
    ) -> None:
        super().__init__(analysis.graph_module, state, double=double)
        self.analysis = analysis
        self.kept = kept
        self.changes = {
            edit.node: arguments for edit, arguments in changed_arguments(analysis, kept)
        }

    def run_node(self, n: Node) -> Any:
        if n not in self.analysis.mixing:
            return super().run_node(n)
        arguments = {**arguments_of(n), **self.changes.get(n, {})}
        arguments = {
            name: self._without_removed(value) if isinstance(value, Node) else value
            for name, value in arguments.items()
        }
        return self._with_zeros(n, self.call_function(n.target, (), arguments))

    def _without_removed(self, node: Node) -> Tensor:
        value: Tensor = self.env[node]
        for axis, dim in enumerate(self.analysis.shapes[node]):
            chosen = mask(dim, self.kept)
            if not bool(chosen.all()):
                value = value.index_select(axis, chosen.nonzero().flatten().to(value.device))
        return value

    def _with_zeros(self, node: Node, value: Tensor) -> Tensor:
        for axis, dim in enumerate(self.analysis.shapes[node]):
            chosen = mask(dim, self.kept)
            if not bool(chosen.all()):
                whole = value.new_zeros(*value.shape[:axis], len(chosen), *value.shape[axis + 1 :])
                where = chosen.nonzero().flatten().to(value.device)
                value = whole.index_copy(axis, where, value)
        return value
