"""Tensors that the graph makes itself."""

from __future__ import annotations

from slimdown.capture.call import BATCH, Call, Shape
from slimdown.capture.dims import Var

FILLED = ("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")


def filled(call: Call) -> Shape:
    """`zeros`, `full`, `new_ones`, …: the same value everywhere, so any channel can go."""
    output = tuple(
        Var(size, BATCH if call.is_symbolic(axis) else None)
        for axis, size in enumerate(call.output_sizes())
    )
    call.edit_sizes("size", output)
    return output


def numbered(call: Call) -> Shape:
    """`arange`, `linspace`, `eye`: every value tells its position."""
    return tuple(
        Var(size, BATCH if call.is_symbolic(axis) else call.name)
        for axis, size in enumerate(call.output_sizes())
    )


def meshgrid(call: Call) -> list[Shape]:
    """Vectors of sizes H, W, … to as many tensors (H, W, …), or (W, H, …) if indexed by "xy"."""
    dims = [shape[0] if shape else Var(1) for shape in call.list_of_shapes("tensors")]
    if "indexing" in call.names and call.argument("indexing") == "xy":
        dims[:2] = dims[1::-1]
    return [tuple(dims)] * len(dims)
