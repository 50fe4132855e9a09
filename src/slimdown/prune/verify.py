"""Proof that surgery did what was planned: the pruned graph equals the masked original.

The original graph runs with the weights of every removed channel at zero. Operator by operator,
the pruned graph's own call gets the kept part of the same inputs, and must give the kept part of
the same output. By induction both graphs then compute the same, whatever rounding does on the way
through a deep network; and a mistake is named where it happens. An operator that differs by more
than float32 explains is settled in float64.

A check that cannot fail proves nothing. So weights that say nothing are random ones (see
`prune.probe`), and a wrong index is put in on purpose, which must be noticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

from slimdown.capture import Analysis
from slimdown.capture.call import arguments_of, operator_name
from slimdown.capture.dims import Dim, Kept, mask
from slimdown.prune.plan import slices_of
from slimdown.prune.probe import Probe, Replay, has_spread, to_double, with_other_inputs
from slimdown.prune.surgery import changed_arguments

TOLERANCE = 1e-5
"""Largest relative error between what must be equal."""

SMALL = 64
"""Height and width of the images that are enough to tell channels apart, where the graph allows."""

_SUMS = frozenset({"matmul", "bmm", "mm", "scaled_dot_product_attention"})
"""Operators to which a channel of zeros is the same as none."""

_UNINITIALIZED = frozenset({"aten::empty", "aten::empty_like", "aten::new_empty"})
"""Operators that give whatever the memory held."""


class Unverified(AssertionError):
    """A pruned model does not compute what it should: a bug of slimdown, never delivered."""


class _Unnoticed(Unverified):
    """These inputs do not tell right from wrong; others may."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was found when a pruned graph was held against its masked original."""

    relative_error: float
    """The largest of any operator, as a fraction of the norm of what it gives."""
    control_error: float | None
    """That of a wrong index, put in on purpose; None where nothing was removed."""
    num_operators: int
    """How many gave the right result."""


def check_surgery(analysis: Analysis, kept: Kept, pruned: GraphModule, probe: Probe) -> float:
    """Return the relative error of `pruned` against the masked original. Raises Unverified."""
    return compare(analysis, kept, pruned, probe).relative_error


def compare(analysis: Analysis, kept: Kept, pruned: GraphModule, probe: Probe) -> Comparison:
    """Hold `pruned` against the masked original on the probe. Raises Unverified.

    Where that tells nothing, on others: the few channels that are left may be dead for two samples.
    """
    *probes, last = with_other_inputs(probe)
    for each in probes:
        with suppress(_Unnoticed):
            return _compare(analysis, kept, pruned, each)
    return _compare(analysis, kept, pruned, last)


def _compare(analysis: Analysis, kept: Kept, pruned: GraphModule, probe: Probe) -> Comparison:
    """Take images small where the graph allows it: what is pruned are channels."""
    small = tuple(_shrink(each) for each in probe.inputs)
    if small[0].shape != probe.inputs[0].shape:
        try:
            return _SideBySide(analysis, kept, pruned, probe).compare(small)
        except _Unnoticed:
            raise
        except Exception:  # sizes of images are written into this graph: only they can settle it
            pass
    return _SideBySide(analysis, kept, pruned, probe).compare(probe.inputs)


def _shrink(images: Tensor) -> Tensor:
    if images.ndim != 4:
        return images
    height, width = (SMALL if size >= 2 * SMALL else size for size in images.shape[2:])
    return images[:, :, :height, :width].contiguous()


def _mask(tensor: Tensor, axes: Mapping[int, tuple[int, ...]]) -> Tensor:
    masked = tensor.clone()
    for axis, kept in axes.items():
        gone = torch.ones(tensor.shape[axis], dtype=torch.bool)
        gone[list(kept)] = False
        masked.index_fill_(axis, gone.nonzero().flatten().to(tensor.device), 0)
    return masked


class _SideBySide(Replay):
    """Runs the original graph on a masked state, and each call of the pruned graph beside it.

    Where an operator mixes channels (a norm, a product of activations), a removed channel would
    count although it is zero; there it is taken out before and put back as zeros after.
    """

    def __init__(self, analysis: Analysis, kept: Kept, pruned: GraphModule, probe: Probe) -> None:
        slices = slices_of(analysis, kept)
        # Statistics and quantization scales stay: with its weights at zero, a channel says nothing.
        weights = analysis.parameters.keys() | {layer.weight for layer in analysis.layers}
        masked = {
            name: _mask(tensor, slices.get(name, {}) if name in weights else {})
            for name, tensor in probe.state.items()
        }
        super().__init__(analysis.graph_module, masked)
        self.analysis = analysis
        self.kept = analysis.at_batch_size(kept, len(probe.inputs[0]))
        self.changes = {
            edit.node: arguments for edit, arguments in changed_arguments(analysis, kept)
        }
        self.beside = Replay(pruned, probe.sliced(slices).state)
        twins = dict(zip(analysis.graph_module.graph.nodes, pruned.graph.nodes, strict=True))
        self.twins: Mapping[Node, Node] = twins
        self.originals = {twin: node for node, twin in twins.items()}
        self.values: dict[Node, Any] = {}
        """What the pruned graph's calls gave where that is no tensor: sizes, lists of tensors."""
        self.device = probe.inputs[0].device
        self.whole = probe.state
        self.spoiled: set[Node] = set()
        """Calls whose reference a removed channel would spoil: zero times log(0) is no number."""
        self._known: dict[int, tuple[int, Tensor | None]] = {}
        self.error = 0.0
        self.control: float | None = None
        self.num_operators = 0

    def compare(self, inputs: tuple[Tensor, ...]) -> Comparison:
        outputs = [self.run(each) for each in inputs]
        if not has_spread(outputs):
            raise _Unnoticed("the outputs do not depend on the input, so nothing can be verified")
        if self.control is not None and self.control <= TOLERANCE:
            raise _Unnoticed(
                "a wrong index, put in on purpose, goes unnoticed: none of the layers that were "
                "pruned has an effect"
            )
        return Comparison(
            relative_error=self.error,
            control_error=self.control,
            num_operators=self.num_operators,
        )

    def run_node(self, n: Node) -> Any:
        if n.op != "call_function":
            value = super().run_node(n)
            if n.op == "get_attr" and isinstance(value, Tensor):
                self._judge(n, self.beside.get_attr(self.twins[n].target, (), {}), value)
            return value
        result = self._call_twin(n)  # first, since operators may write into their inputs
        value = self._call_original(n)
        if self._is_spoiled(n, result, value):
            self.spoiled.add(n)
            value = self._call_original(n)
        if not isinstance(value, Tensor) or n not in self.analysis.shapes:
            self.values[n] = result
        elif not _is_arbitrary(n):
            self._judge(n, result, value)
            if self.control is None or self.control <= TOLERANCE:
                self._try_wrong_index(n, value)
        return value

    # --------------------------------------------------------------------------- the two calls

    def _call_twin(self, n: Node, *, double: bool = False, wrong: Tensor | None = None) -> Any:
        """The pruned graph's call on the kept part of the original's inputs.

        With `wrong` in the place of the first weight that was sliced.
        """
        twin = self.twins[n]
        replaced = None if wrong is None else self._sliced_weight(n)
        args, kwargs = map_arg(
            (twin.args, twin.kwargs),
            lambda source: wrong if source is replaced else self._kept_value(source),
        )
        if _writes(n):
            args, kwargs = tree_map(_clone, (args, kwargs))
        return _call(twin.target, args, kwargs, double=double)

    def _kept_value(self, twin: Node) -> Any:
        """What a node of the pruned graph would have given."""
        node = self.originals[twin]
        if node in self.values:
            return self.values[node]
        if node.op == "get_attr":
            return self.beside.get_attr(twin.target, (), {})
        return self._without_removed(node)

    def _call_original(self, n: Node, *, double: bool = False) -> Any:
        """The original's call; where it mixes channels, without the removed ones."""
        if n not in self.analysis.mixing or self._sums_zeros(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if n in self.spoiled:
                args, kwargs = map_arg((n.args, n.kwargs), self._zero_filled)
            return _call(n.target, args, kwargs, double=double)
        arguments = {**arguments_of(n), **self.changes.get(n, {})}
        arguments = map_arg(arguments, self._without_removed)
        return self._with_zeros(n, _call(n.target, (), arguments, double=double))

    def _sums_zeros(self, n: Node) -> bool:
        """Whether removed channels count for nothing although the operator mixes channels."""
        if operator_name(n).removeprefix("aten::") not in _SUMS:
            return False
        return all(self._removed_is_zero(source) for source in n.all_input_nodes)

    def _is_spoiled(self, n: Node, result: Any, value: Any) -> bool:
        """Whether removed channels alone make what is kept of the original's output infinite."""
        if not isinstance(value, Tensor) or not isinstance(result, Tensor) or _writes(n):
            return False
        if n not in self.analysis.shapes or value.isfinite().all() or not result.isfinite().all():
            return False
        return not self._kept(n, value).isfinite().all()

    # -------------------------------------------------------------------------------- judging

    def _judge(self, n: Node, result: Any, value: Tensor) -> None:
        """Take down how far a call of the pruned graph is from the kept part of the original's."""
        error = _difference(result, self._kept(n, value))
        if error > TOLERANCE and n.op == "call_function" and not _writes(n):
            exact = self._call_original(n, double=True)
            error = _difference(self._call_twin(n, double=True), self._kept(n, exact))
        if not error <= TOLERANCE:
            raise Unverified(
                f"the pruned graph differs from the masked original by {error:.2e} (relative) at "
                f"{n.name}, where {TOLERANCE:g} is allowed; please report this model"
            )
        self.error = max(self.error, error)
        self.num_operators += 1

    def _try_wrong_index(self, n: Node, value: Tensor) -> None:
        """Take down how much an operator's result changes with a weight of a removed channel."""
        weight = self._sliced_weight(n)
        if weight is None or _writes(n):
            return
        wrong = self.beside.get_attr(weight.target, (), {}).clone()
        whole = self.whole[str(weight.target)]
        axis, chosen = next(
            (axis, chosen)
            for axis, dim in enumerate(self.analysis.shapes[self.originals[weight]])
            if (chosen := self._indices(dim)) is not None
        )
        removed = min(set(range(whole.shape[axis])) - set(chosen.tolist()))
        row = whole.select(axis, removed)  # of a removed channel, the other axes as they should be
        for other, dim in enumerate(self.analysis.shapes[self.originals[weight]]):
            indices = self._indices(dim)
            if other != axis and indices is not None:
                row = row.index_select(other - (other > axis), indices)
        wrong.select(axis, 0).copy_(row)
        error = _difference(self._call_twin(n, wrong=wrong), self._kept(n, value))
        self.control = max(self.control or 0.0, error)

    def _sliced_weight(self, n: Node) -> Node | None:
        """The first weight of several axes that a call of the pruned graph reads a part of."""
        for source in self.twins[n].all_input_nodes:
            shape = self.analysis.shapes.get(self.originals[source], ())
            is_weight = source.op == "get_attr" and len(shape) > 1
            if is_weight and any(self._indices(dim) is not None for dim in shape):
                return source
        return None

    # ------------------------------------------------------------------- the kept part of values

    def _indices(self, dim: Dim) -> Tensor | None:
        """The channels of a dim that are kept; None where all are."""
        return self._chosen(dim)[1]

    def _chosen(self, dim: Dim) -> tuple[int, Tensor | None]:
        """How many channels a dim has, and which are kept; None where all are."""
        if id(dim) not in self._known:
            chosen = mask(dim, self.kept)
            indices = None if bool(chosen.all()) else chosen.nonzero().flatten().to(self.device)
            self._known[id(dim)] = (len(chosen), indices)
        return self._known[id(dim)]

    def _without_removed(self, node: Node) -> Any:
        return self._kept(node, self.env[node])

    def _kept(self, node: Node, value: Any) -> Any:
        if isinstance(value, Tensor):
            for axis, dim in enumerate(self.analysis.shapes.get(node, ())):
                indices = self._indices(dim)
                if indices is not None:
                    value = value.index_select(axis, indices)
        return value

    def _zero_filled(self, node: Node) -> Any:
        value = self.env[node]
        is_tensor = isinstance(value, Tensor) and node in self.analysis.shapes
        return self._with_zeros(node, self._kept(node, value)) if is_tensor else value

    def _with_zeros(self, node: Node, value: Tensor) -> Tensor:
        for axis, dim in enumerate(self.analysis.shapes[node]):
            indices = self._indices(dim)
            if indices is not None:
                size = len(mask(dim, self.kept))
                whole = value.new_zeros(*value.shape[:axis], size, *value.shape[axis + 1 :])
                value = whole.index_copy(axis, indices, value)
        return value

    def _removed_is_zero(self, node: Node) -> bool:
        value = self.env[node]
        kept = self._kept(node, value)
        return kept is value or bool(torch.equal(self._with_zeros(node, kept), value))


def _call(target: Any, args: Any, kwargs: Any, *, double: bool) -> Any:
    if double:
        args, kwargs = tree_map(to_double, (args, kwargs))
    return target(*args, **kwargs)


def _difference(result: Any, reference: Tensor) -> float:
    """Norm of the difference over that of the reference; infinite where shapes differ."""
    if not isinstance(result, Tensor) or result.shape != reference.shape:
        return float("inf")
    if torch.equal(result, reference):
        return 0.0
    if not reference.is_floating_point():
        return float("inf")
    ours, theirs = result.double(), reference.double()
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())  # infinity less itself is no number
    difference = (ours - theirs).masked_fill(same, 0).norm()
    scale = theirs.masked_fill(~theirs.isfinite(), 0).norm()
    return float(difference / scale) if scale > 0 else float(difference > 0) * float("inf")


def _is_arbitrary(node: Node) -> bool:
    """Whether no two calls of an operator need to agree."""
    return isinstance(node.target, torch._ops.OpOverload) and operator_name(node) in _UNINITIALIZED


def _writes(node: Node) -> bool:
    """Whether an operator call changes one of its inputs."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
