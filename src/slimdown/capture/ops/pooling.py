"""Pooling and resizing of the spatial dims."""

from __future__ import annotations

from slimdown.capture.call import SPATIAL, Call, Shape
from slimdown.capture.dims import Var, freeze_

NAMES = (
    "max_pool1d",
    "avg_pool1d",
    "adaptive_avg_pool1d",
    "adaptive_max_pool1d",
    "max_pool1d_with_indices",
    "upsample_nearest1d",
    "_upsample_nearest_exact1d",
    "max_pool2d",
    "avg_pool2d",
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "_adaptive_avg_pool2d",
    "max_pool2d_with_indices",
    "upsample_nearest2d",
    "_upsample_nearest_exact2d",
    "max_pool3d",
    "avg_pool3d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool3d",
    "_adaptive_avg_pool3d",
    "max_pool3d_with_indices",
    "upsample_nearest3d",
    "_upsample_nearest_exact3d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)


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
