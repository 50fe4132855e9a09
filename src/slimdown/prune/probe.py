"""Inputs and weights on which a wrong index shows, and how outputs are compared.

With a model's own weights much could go wrong unseen: fresh batch norms are constant, branches
initialized at zero contribute nothing, layer scales of 1e-6 next to it; and the outputs of a
network that was never trained hardly depend on its input. So constant and almost-zero tensors
give way to random ones, and batch norms that have seen no data to the statistics of the inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves, tree_map

from slimdown.capture import Analysis, has_dynamic_batch
from slimdown.capture.call import arguments_of, operator_name
from slimdown.errors import BadInput
from slimdown.prune.plan import Slices
from slimdown.prune.surgery import slice_tensor

NUM_SAMPLES = 2

MORE_INPUTS = 8
"""How many other inputs are tried where the channels that are left are dead for the probe's."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a network and its pruned form are compared on."""

    inputs: tuple[Tensor, ...]
    """One batch, or several of one sample where the graph's batch is static."""
    state: Mapping[str, Tensor]

    def sliced(self, slices: Slices) -> Probe:
        """The probe for the pruned network."""
        state = {name: slice_tensor(t, slices.get(name, {})) for name, t in self.state.items()}
        return replace(self, state=state)

    def first(self) -> Probe:
        """The probe with the first of its inputs only."""
        return replace(self, inputs=self.inputs[:1])

    def double(self) -> Probe:
        """The probe in float64."""
        state = {name: to_double(tensor) for name, tensor in self.state.items()}
        return replace(self, inputs=tuple(map(to_double, self.inputs)), state=state)

    def outputs(self, module: nn.Module) -> list[Any]:
        """What a module gives for the inputs with the probe's state in the place of its own."""
        own = dict(chain(module.named_parameters(), module.named_buffers()))
        state = {name: tensor for name, tensor in self.state.items() if name in own}
        with torch.no_grad():
            # Copies, since a forward may write into its input.
            return [functional_call(module, state, (each.clone(),)) for each in self.inputs]


def with_other_inputs(probe: Probe) -> Iterator[Probe]:
    """The probe, and then some with other inputs, each stronger than the one before."""
    yield probe
    generator = torch.Generator().manual_seed(0)
    for strength in range(1, MORE_INPUTS + 1):
        noise = (torch.randn(each.shape, generator=generator) for each in probe.inputs)
        inputs = tuple(strength * new.to(old) for new, old in zip(noise, probe.inputs, strict=True))
        yield replace(probe, inputs=inputs)


def make_probe(analysis: Analysis) -> Probe:
    """A probe for a captured network; always the same for the same network."""
    generator = torch.Generator().manual_seed(0)
    own = {name: analysis.tensor(name) for name in analysis.tensors}  # tied ones are one object
    revived = {id(t): _revive(t.detach(), generator) for t in dict.fromkeys(own.values())}
    state = {name: revived[id(tensor)] for name, tensor in own.items()}
    # Small as the scales of quantizers are, with others all weights would round to zero.
    state.update({name: own[name].detach() for name in _grids(analysis.graph_module)})
    inputs = _random_inputs(analysis.graph_module, generator)
    fresh = _fresh_norms(analysis.graph_module, own)
    if fresh:
        observer = _ObserveNorms(analysis.graph_module, state, fresh)
        observer.run(inputs[0])
        state.update(observer.observed)
    return Probe(inputs=tuple(inputs), state=state)


def _grids(graph_module: GraphModule) -> set[str]:
    """The scales and zero points that fake quantizers read."""
    quantizers = (
        node
        for node in graph_module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and operator_name(node).startswith("slimdown::fake_quantize")
    )
    grids = chain.from_iterable(node.args[1:3] for node in quantizers)
    return {str(grid.target) for grid in grids if isinstance(grid, Node)}


def _fresh_norms(graph_module: GraphModule, state: Mapping[str, Tensor]) -> set[str]:
    """The running means of the batch norms that have seen no data."""
    norms = (n for n in graph_module.graph.nodes if n.target is torch.ops.aten.batch_norm.default)
    means = (arguments_of(norm)["running_mean"] for norm in norms)
    names = {str(mean.target) for mean in means if isinstance(mean, Node)}
    return {name for name in names & state.keys() if _is_flat(state[name])}


def relative_error(
    results: Sequence[Any], reference: Sequence[Any], *, sizes: Sequence[int] | None = None
) -> float:
    """Error over spread: the outputs for several inputs, each centered over them.

    What outputs have in common does not tell whether they depend on the input as they should.
    NaN where they do not depend on the input at all. Outputs that are no list of samples, such as
    anchors or a mean, are compared as they are. `sizes` are those of the batches, where they are
    not the probe's.
    """
    if [_shapes(output) for output in results] != [_shapes(output) for output in reference]:
        return float("inf")
    sizes = sizes or _probe_sizes(reference)
    batched = set(_find_batched(reference, sizes))
    others = set(range(len(_shapes(reference[0])))) - batched
    errors = []
    if batched:
        ours, theirs = _centered(results, sizes, batched), _centered(reference, sizes, batched)
        spread = float(theirs.norm())
        errors.append(float((ours - theirs).norm()) / spread if spread > 0 else float("nan"))
    if others:
        ours, theirs = _flat(results, others), _flat(reference, others)
        error = float((ours - theirs).norm())
        errors.append(error and error / max(float(theirs.norm()), 1e-30))
    return float(torch.tensor(errors).max()) if errors else float("nan")  # that of NaN is NaN


def has_spread(outputs: Sequence[Any]) -> bool:
    """Whether a probe's outputs for several inputs differ at all. Raises BadInput."""
    for output in outputs:
        require_finite(output)
    sizes = _probe_sizes(outputs)
    return bool(_centered(outputs, sizes, batched_outputs(outputs, sizes)).abs().max() > 0)


def floating_outputs(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output, whatever holds them."""
    leaves = tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def batched_outputs(outputs: Sequence[Any], sizes: Sequence[int]) -> tuple[int, ...]:
    """Which of the floating-point outputs list the samples of batches of these sizes.

    Their axis 0 is the batch or, where that is so of none, a multiple of it, such as the crops of
    all images. Raises BadInput where there are none.
    """
    found = _find_batched(outputs, sizes)
    if not found:
        given = ", ".join(_tell(leaf) for leaf in tree_leaves(outputs[0])) or "nothing"
        raise BadInput(
            "prune tells by a model's outputs what matters, image by image, and needs one of "
            f"floating-point numbers with the batch as axis 0; for a batch of {sizes[0]} this "
            f"model gives {given}: wrap it in a module that returns its logits or features, (N, …)"
        )
    return found


def in_rows(output: Any, size: int, which: Collection[int]) -> Tensor:
    """Those of the floating-point outputs that list the samples of one batch, (size, values)."""
    tensors = floating_outputs(output)
    return torch.cat([tensors[index].detach().reshape(size, -1) for index in sorted(which)], 1)


def require_finite(output: Any) -> None:
    """Raise BadInput where a model's output holds NaN or infinity."""
    for index, tensor in enumerate(floating_outputs(output)):
        if not tensor.isfinite().all():
            raise BadInput(
                f"output {index} of this model, {_tell(tensor)}, holds NaN or infinity, of which "
                "nothing can be learned: give images as it was trained on; where it masks its "
                "outputs with infinity, do so in a module around it"
            )


def require_finite_state(analysis: Analysis) -> None:
    """Raise BadInput where a model's weights or statistics hold NaN or infinity."""
    for name in analysis.tensors:
        tensor = analysis.tensor(name).detach()
        if not tensor.is_floating_point() or _is_finite(tensor):
            continue
        if name in analysis.parameters or not _is_meant(tensor):
            raise BadInput(
                f"{name} of this model holds NaN or infinity: give weights of before its training "
                "diverged"
            )


def _is_finite(tensor: Tensor) -> bool:
    """Without a copy of it, unless its sum is infinite."""
    return bool(tensor.sum().isfinite() or tensor.isfinite().all())


def _is_meant(buffer: Tensor) -> bool:
    """Whether infinity in a buffer has a sense: minus infinity masks places, a scalar bounds."""
    return not bool(buffer.isnan().any()) and (buffer.ndim == 0 or bool((buffer < torch.inf).all()))


def _find_batched(outputs: Sequence[Any], sizes: Sequence[int]) -> tuple[int, ...]:
    several = [_shapes(output) for output in outputs]
    indices = [i for i in range(min(map(len, several))) if all(shapes[i] for shapes in several)]
    lengths = {i: [shapes[i][0] for shapes in several] for i in indices}
    exact = [i for i in indices if lengths[i] == list(sizes)]
    multiple = (
        i
        for i in indices
        if all(n > 0 and n % size == 0 for n, size in zip(lengths[i], sizes, strict=True))
    )
    return tuple(exact or multiple)


def _probe_sizes(outputs: Sequence[Any]) -> list[int]:
    """Of the batches of a probe: one of all its samples, or one for each."""
    return [max(1, NUM_SAMPLES // len(outputs))] * len(outputs)


def _shapes(output: Any) -> list[torch.Size]:
    return [tensor.shape for tensor in floating_outputs(output)]


def _tell(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"


def _centered(outputs: Sequence[Any], sizes: Sequence[int], which: Collection[int]) -> Tensor:
    """The outputs of a few batches less their mean, (samples, values)."""
    pairs = zip(outputs, sizes, strict=True)
    samples = torch.cat([in_rows(output, size, which).double() for output, size in pairs])
    return samples - samples.mean(0)


def _flat(outputs: Sequence[Any], which: Collection[int]) -> Tensor:
    tensors = (floating_outputs(output)[i] for output in outputs for i in sorted(which))
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def _random_inputs(graph_module: GraphModule, generator: torch.Generator) -> list[Tensor]:
    node = next(node for node in graph_module.graph.nodes if node.op == "placeholder")
    example: Tensor = node.meta["val"]
    noise = torch.randn(NUM_SAMPLES, *example.shape[1:], generator=generator)
    samples: Tensor = noise.to(device=example.device, dtype=example.dtype)
    is_dynamic = has_dynamic_batch(graph_module)
    return [samples] if is_dynamic else [sample[None] for sample in samples]


def _is_flat(tensor: Tensor) -> bool:
    """Whether all values are the same or almost zero, so that a wrong index could not show."""
    low, high = tensor.aminmax()
    return bool(low == high) or _is_tiny(tensor)


def _is_tiny(tensor: Tensor) -> bool:
    return bool(tensor.abs().max() < 1e-3)


def _revive(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random values of the same scale in the place of flat ones."""
    if not tensor.is_floating_point() or tensor.numel() < 2 or not _is_flat(tensor):
        return tensor
    if tensor.ndim > 1:  # a weight: outputs of the scale of its inputs
        noise: Tensor = torch.randn(tensor.shape, generator=generator)
        noise /= tensor[0].numel() ** 0.5
    else:  # a bias, a variance, a scale: what is positive serves all of them
        noise = 0.5 + torch.rand(tensor.shape, generator=generator)
    if not _is_tiny(tensor):
        noise *= float(tensor.flatten()[0])
    return noise.to(tensor)


def to_double(value: Any) -> Any:
    """A value, or what an operator is told of its type, in float64 where it is floating-point."""
    if value is torch.float32:
        return torch.float64
    if isinstance(value, GraphModule):  # what runs under autocast, say
        return Replay(value, {}, double=True).run
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


class Replay(Interpreter):
    """Runs a graph on a state of its own; with `double`, all of it in float64."""

    def __init__(
        self, graph_module: GraphModule, state: Mapping[str, Tensor], *, double: bool = False
    ) -> None:
        super().__init__(graph_module)
        self.state = state
        self.double = double

    def cast(self, value: Any) -> Any:
        """The value as this run wants it: in float64, or as it is."""
        return to_double(value) if self.double else value

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return super().run(*map(self.cast, args), **kwargs)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().placeholder(target, args, kwargs)
        return value.clone() if isinstance(value, Tensor) else value  # the graph may write into it

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.state:
            return self.cast(self.state[target])
        return self.cast(super().get_attr(target, args, kwargs))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map(self.cast, (args, kwargs))
        return super().call_function(target, args, kwargs)


class _ObserveNorms(Replay):
    """Gives the batch norms that were never trained the statistics of their inputs, and weights
    of about 1."""

    def __init__(
        self, graph_module: GraphModule, state: Mapping[str, Tensor], fresh: set[str]
    ) -> None:
        super().__init__(graph_module, state)
        self.fresh = fresh
        self.observed: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        if n.target is torch.ops.aten.batch_norm.default:
            arguments = arguments_of(n)
            mean, variance = arguments["running_mean"], arguments["running_var"]
            weight = arguments["weight"]
            if isinstance(mean, Node) and mean.target in self.fresh:
                x = self.env[arguments["input"]].transpose(0, 1).flatten(1)  # (C, N·H·W)
                seen = {mean: x.mean(1), variance: x.var(1, correction=0).clamp_min(1e-3)}
                if isinstance(weight, Node):  # some libraries start with almost none
                    seen[weight] = self.env[weight] / self.env[weight].abs().mean()
                for node, value in seen.items():
                    self.env[node] = value
                    self.observed[node.target] = value.to(self.state[node.target])
        return super().run_node(n)
