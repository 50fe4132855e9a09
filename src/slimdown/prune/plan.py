"""What pruning did, as data: enough to do it again on the same model, without its importance.

A plan as JSON, version 2:

    {"version": 2, "delivery": "in_place", "input": [3, 224, 224],
     "kept": ["0-3,7,12-15", …],
     "parameters": {"conv1.weight": {"shape": [64, 3, 7, 7], "kept": {"0": 0}}, …},
     "attributes": {"conv1": {"out_channels": 9}, …},
     "traced": ["blocks.0.attn", …]}

Each axis that was pruned names its indices by their place in `kept`, since many share them. The
shapes are those before, so that a plan tells the model it is for from others. Version 1 listed the
indices themselves, and had neither shapes nor traced submodules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from slimdown.capture import Analysis
from slimdown.capture.call import sizes_of
from slimdown.capture.dims import Kept, Var, is_frozen, mask, rows_of_leaves
from slimdown.core import Json
from slimdown.errors import BadInput

Delivery: TypeAlias = Literal["in_place", "graph"]

Slices: TypeAlias = Mapping[str, Mapping[int, tuple[int, ...]]]
"""Tensor name -> axis -> the indices that are kept; what is missing is whole."""

Attributes: TypeAlias = Mapping[str, Mapping[str, int | tuple[int, ...]]]
"""Module name -> attribute -> its new value, such as "layer1.0.conv1" -> "out_channels" -> 8."""

VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which slices of the state are kept, and how the result is delivered."""

    delivery: Delivery
    slices: Slices
    attributes: Attributes
    traced: tuple[str, ...] = ()
    """The submodules that run as their pieces of the graph: see `prune.traced`."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Tensor name -> its shape before, for each that is sliced; none in plans of version 1."""
    input_shape: tuple[int, ...] = ()
    """That of one input, (C, H, W); none in plans of version 1."""

    def to_json(self) -> Json:
        texts: dict[str, int] = {}
        parameters: Json = {}
        for name, axes in self.slices.items():
            places = {
                str(axis): texts.setdefault(_to_ranges(kept), len(texts))
                for axis, kept in axes.items()
            }
            parameters[name] = {"shape": list(self.shapes.get(name, ())), "kept": places}
        return {
            "version": VERSION,
            "delivery": self.delivery,
            "input": list(self.input_shape),
            "kept": list(texts),
            "parameters": parameters,
            "attributes": {
                module: {
                    name: list(value) if isinstance(value, tuple) else value
                    for name, value in values.items()
                }
                for module, values in self.attributes.items()
            },
            "traced": list(self.traced),
        }

    @classmethod
    def from_json(cls, structure: Json) -> Plan:
        """Read what `to_json` wrote, also by earlier versions. Raises BadInput."""
        try:
            version = structure.get("version", 1)
            if version not in (1, VERSION):
                raise BadInput(
                    f"this plan is of version {version!r}, and this slimdown reads up to "
                    f"{VERSION}: update slimdown"
                )
            delivery = structure["delivery"]
            if delivery not in ("in_place", "graph"):
                raise ValueError(f"unknown delivery {delivery!r}")
            attributes = {
                module: {
                    name: tuple(map(int, value)) if isinstance(value, list) else int(value)
                    for name, value in values.items()
                }
                for module, values in structure["attributes"].items()
            }
            parameters = structure["parameters"]
            if version == 1:
                return cls(
                    delivery=delivery,
                    slices={
                        name: {int(axis): tuple(map(int, kept)) for axis, kept in axes.items()}
                        for name, axes in parameters.items()
                    },
                    attributes=attributes,
                )
            kept = [_from_ranges(text) for text in structure["kept"]]
            return cls(
                delivery=delivery,
                slices={
                    name: {int(axis): kept[place] for axis, place in entry["kept"].items()}
                    for name, entry in parameters.items()
                },
                attributes=attributes,
                traced=tuple(map(str, structure["traced"])),
                shapes={name: tuple(map(int, e["shape"])) for name, e in parameters.items()},
                input_shape=tuple(map(int, structure["input"])),
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            if isinstance(error, BadInput):
                raise
            raise BadInput(
                f"this is not the plan of a pruning: {error!r}; "
                "prune again, or take the plan.json that belongs to the weights"
            ) from error

    def check(self, model: nn.Module) -> None:
        """Raise BadInput where `model` is not what was pruned, naming what differs first."""
        for name, axes in self.slices.items():
            tensor = find_tensor(model, name)
            if tensor is None:
                raise BadInput(f"the plan is of another model: this one has no {name}; {_ADVICE}")
            shape, planned = tuple(tensor.shape), self.shapes.get(name)
            if planned is not None and shape != planned:
                raise BadInput(
                    f"the plan is of another model: {name} was {planned} where it was pruned and "
                    f"is {shape} here; {_ADVICE}"
                )
            for axis, kept in axes.items():
                if axis >= len(shape) or not kept or max(kept) >= shape[axis]:
                    raise BadInput(
                        f"the plan is of another model: it keeps {len(kept)} of the channels on "
                        f"axis {axis} of {name}, which is {shape} here; {_ADVICE}"
                    )
        modules = dict(model.named_modules())
        for name in (*self.attributes, *self.traced):
            if name not in modules:
                raise BadInput(
                    f"the plan is of another model: this one has no module {name}; {_ADVICE}"
                )


_ADVICE = "rebuild it from the model that was pruned, made with the same options"


def _to_ranges(kept: Iterable[int]) -> str:
    """Ascending indices as text: "0-3,7,12-15"."""
    runs: list[list[int]] = []
    for index in kept:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def _from_ranges(text: str) -> tuple[int, ...]:
    def read(run: str) -> Iterator[int]:
        first, _, last = run.partition("-")
        yield from range(int(first), int(last or first) + 1)

    return tuple(index for run in text.split(",") for index in read(run))


def find_tensor(model: nn.Module, name: str) -> Tensor | None:
    """A parameter, buffer or other tensor of a model by its dotted name."""
    try:
        found: Any = attrgetter(name)(model)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None


def plan_of(analysis: Analysis, kept: Kept, model: nn.Module) -> Plan:
    """The plan that keeps what `kept` says of `model`, in place and without attributes yet.

    Constants that the model's code makes anew in each call are in its graph only, and so not here.
    """
    slices = slices_of(analysis, kept)
    slices = {name: axes for name, axes in slices.items() if find_tensor(model, name) is not None}
    inputs = (n.meta["val"] for n in analysis.graph_module.graph.nodes if n.op == "placeholder")
    return Plan(
        delivery="in_place",
        slices=slices,
        attributes={},
        shapes={name: tuple(analysis.tensor(name).shape) for name in slices},
        input_shape=tuple(sizes_of(next(inputs))[1:]),
    )


def slices_of(analysis: Analysis, kept: Kept) -> Slices:
    """What is kept of each tensor, once each leaf keeps what `kept` says."""
    slices: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, shape in analysis.tensors.items():
        for axis, dim in enumerate(shape):
            chosen = mask(dim, kept)
            if not bool(chosen.all()):
                indices = tuple(chosen.nonzero().flatten().tolist())
                slices.setdefault(name, {})[axis] = indices
    return slices


def kept_from_slices(analysis: Analysis, slices: Slices) -> Kept:
    """What each leaf keeps, read back from the tensors. Raises BadInput for another model's."""
    kept: dict[Var, Tensor] = {}
    for name, axes in slices.items():
        shape = analysis.tensors.get(name)
        for axis, indices in axes.items():
            if shape is None or axis >= len(shape) or max(indices) >= shape[axis].size:
                raise BadInput(
                    f"the plan prunes axis {axis} of {name!r}, which this model lacks; {_ADVICE}"
                )
            chosen = torch.zeros(shape[axis].size, dtype=torch.bool)
            chosen[list(indices)] = True
            for leaf, rows in rows_of_leaves(shape[axis], chosen):
                if is_frozen(leaf):
                    continue
                own = rows.reshape(leaf.size, -1).any(1)
                if not torch.equal(own, kept.setdefault(leaf, own)):
                    raise BadInput(
                        f"the plan contradicts itself: axis {axis} of {name} keeps other channels "
                        "than what it goes together with; it was damaged, or edited by hand"
                    )
    return kept
