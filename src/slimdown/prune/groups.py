"""The groups of channels that are kept or removed together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from slimdown.capture import Analysis, analyze, capture
from slimdown.capture.dims import Var, leaves


@dataclass(frozen=True, kw_only=True)
class ChannelGroup:
    """Channels that go together: removing channel i removes it from every member."""

    name: str
    """The first layer that makes them, or else what freezes them, such as "input"; with "/1", "/2",
    … where a layer makes several groups."""
    size: int
    """How many channels."""
    layers: tuple[str, ...]
    """The layers that make them, in the order of the graph."""
    members: tuple[tuple[str, int], ...]
    """Tensors that have the channels, each with its axis."""
    num_parameters: int
    """Values of all parameters among the members."""
    reason: str | None
    """Why no channel can be removed; None where they can."""

    @property
    def frozen(self) -> bool:
        return self.reason is not None


def find_groups(model: nn.Module, example_input: Tensor) -> tuple[ChannelGroup, ...]:
    """Find the groups of a model, in the order of its layers. Raises CannotCapture.

    `example_input` (1, C, H, W).
    """
    return tuple(group_channels(analyze(capture(model, example_input))).values())


def group_channels(analysis: Analysis) -> Mapping[Var, ChannelGroup]:
    """The group of each channel leaf, in the order of the layers that make them."""
    members = _members(analysis)
    makers: dict[Var, list[str]] = {leaf: [] for leaf in analysis.channels}
    for layer in analysis.layers:
        for leaf in dict.fromkeys(leaves(layer.output)):
            if leaf in makers:
                makers[leaf].append(layer.name)
    order = {layer.name: index for index, layer in reversed(list(enumerate(analysis.layers)))}
    ordered = sorted(makers, key=lambda leaf: order[makers[leaf][0]] if makers[leaf] else -1)
    bases = [_base_name(leaf, makers[leaf], members[leaf]) for leaf in ordered]
    names = dict(zip(ordered, _distinct(bases), strict=True))
    return {
        leaf: ChannelGroup(
            name=names[leaf],
            size=leaf.size,
            layers=tuple(dict.fromkeys(makers[leaf])),
            members=members[leaf],
            num_parameters=sum(
                analysis.parameters[name].numel()
                for name in dict.fromkeys(name for name, _ in members[leaf])
                if name in analysis.parameters
            ),
            reason=leaf.reason,
        )
        for leaf in ordered
    }


def _members(analysis: Analysis) -> dict[Var, tuple[tuple[str, int], ...]]:
    found: dict[Var, list[tuple[str, int]]] = {}
    for name, shape in analysis.tensors.items():
        for axis, dim in enumerate(shape):
            for leaf in dict.fromkeys(leaves(dim)):
                found.setdefault(leaf, []).append((name, axis))
    return {leaf: tuple(places) for leaf, places in found.items()}


def _base_name(leaf: Var, makers: list[str], members: tuple[tuple[str, int], ...]) -> str:
    if makers:
        return makers[0]
    tensor = members[0][0]
    return leaf.reason or tensor.rpartition(".")[0] or tensor


def _distinct(names: list[str]) -> list[str]:
    """Number the names that occur more than once."""
    counts, seen = Counter(names), Counter[str]()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if counts[name] == 1 else f"{name}/{seen[name]}")
    return distinct
