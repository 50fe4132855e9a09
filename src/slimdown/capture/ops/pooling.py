"""Pooling and resizing of the spatial dims."""

from __future__ import annotations

from slimdown.capture.call import SPATIAL, Call, Shape
from slimdown.capture.dims import Var, freeze_


def pooling(call: Call) -> Shape | list[Shape]:
    """(…, H, W) to (…, H', W'); the operator's name tells how many dims are spatial."""
    x = call.input_shapes()[0]
    num_spatial = next(ndim for ndim in (1, 2, 3) if f"{ndim}d" in call.name)
    kept, spatial = x[:-num_spatial], x[-num_spatial:]
    for dim in spatial:
        freeze_(dim, SPATIAL)

    def pooled(sizes: list[int]) -> Shape:
        return (*kept, *(Var(size, SPATIAL) for size in sizes[-num_spatial:]))

    if isinstance(call.node.meta["val"], list | tuple):  # with the indices of the maxima
        return [pooled(sizes) for sizes in call.outputs_sizes()]
    return pooled(call.output_sizes())
