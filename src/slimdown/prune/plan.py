"""What pruning did, as data: enough to do it again on the same model, without its importance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from slimdown.capture import Analysis
from slimdown.capture.dims import Kept, Var, is_frozen, mask, rows_of_leaves
from slimdown.core import Json
from slimdown.errors import BadInput

Delivery: TypeAlias = Literal["in_place", "graph"]

Slices: TypeAlias = Mapping[str, Mapping[int, tuple[int, ...]]]
"""Tensor name -> axis -> the indices that are kept; what is missing is whole."""

Attributes: TypeAlias = Mapping[str, Mapping[str, int | tuple[int, ...]]]
"""Module name -> attribute -> its new value, such as "layer1.0.conv1" -> "out_channels" -> 8."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which slices of the state are kept, and how the result is delivered."""

    delivery: Delivery
    slices: Slices
    attributes: Attributes

    def to_json(self) -> Json:
        return {
            "delivery": self.delivery,
            "parameters": {
                name: {str(axis): list(kept) for axis, kept in axes.items()}
                for name, axes in self.slices.items()
            },
            "attributes": {
                module: {
                    name: list(value) if isinstance(value, tuple) else value
                    for name, value in values.items()
                }
                for module, values in self.attributes.items()
            },
        }

    @classmethod
    def from_json(cls, structure: Json) -> Plan:
        """Read what `to_json` wrote. Raises BadInput."""
        try:
            delivery = structure["delivery"]
            if delivery not in ("in_place", "graph"):
                raise ValueError(f"unknown delivery {delivery!r}")
            return cls(
                delivery=delivery,
                slices={
                    name: {int(axis): tuple(map(int, kept)) for axis, kept in axes.items()}
                    for name, axes in structure["parameters"].items()
                },
                attributes={
                    module: {
                        name: tuple(value) if isinstance(value, list) else int(value)
                        for name, value in values.items()
                    }
                    for module, values in structure["attributes"].items()
                },
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(
                f"this is not the plan of a pruning: {error!r}; "
                "prune again, or take the structure.json that belongs to the weights"
            ) from error


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
                    f"the plan prunes axis {axis} of {name!r}, which this model lacks; "
                    "rebuild it from the model that was pruned"
                )
            chosen = Tensor([False]).bool().repeat(shape[axis].size)
            chosen[list(indices)] = True
            for leaf, rows in rows_of_leaves(shape[axis], chosen):
                if not is_frozen(leaf):
                    kept[leaf] = rows.any(1)
    return kept
