"""Windows that slide over the spatial dims, and the same values between space and channels."""

from __future__ import annotations

from slimdown.capture.call import KERNEL, SPATIAL, Call, Shape, Unsupported
from slimdown.capture.dims import Dim, Var, freeze_, product, unify_


def im2col(call: Call) -> Shape:
    """(N, C, H, W) to (N, C · kernel positions, windows)."""
    x = call.shape("self")
    if len(x) != 4:
        raise Unsupported
    for dim in x[2:]:
        freeze_(dim, SPATIAL)
    _, _, num_windows = call.output_sizes()
    return (x[0], product(x[1], *_kernel(call)), Var(num_windows, SPATIAL))


def col2im(call: Call) -> Shape:
    """(N, C · kernel positions, windows) to (N, C, H, W)."""
    x = call.shape("self")
    if len(x) != 3:
        raise Unsupported
    freeze_(x[2], SPATIAL)
    _, num_channels, *spatial = call.output_sizes()
    channels = Var(num_channels)
    unify_(x[1], product(channels, *_kernel(call)))
    return (x[0], channels, *(Var(size, SPATIAL) for size in spatial))


def _kernel(call: Call) -> list[Dim]:
    return [Var(size, KERNEL) for size in call.integers("kernel_size")]


def unfold(call: Call) -> Shape:
    """Windows along one axis: (…, L, …) to (…, windows, …, window size)."""
    x = call.shape("self")
    axis = call.axis("dimension", len(x))
    freeze_(x[axis], call.name)
    sizes = call.output_sizes()
    return (*x[:axis], Var(sizes[axis], call.name), *x[axis + 1 :], Var(sizes[-1], call.name))


def pixel_shuffle(call: Call) -> Shape:
    """(…, C·r·r, H, W) to (…, C, H·r, W·r)."""
    x, r = call.shape("self"), call.integer("upscale_factor")
    *_, num_channels, height, width = call.output_sizes()
    channels = Var(num_channels)
    unify_(x[-3], product(channels, Var(r, call.name), Var(r, call.name)))
    return (*x[:-3], channels, *_space(x, height, width))


def pixel_unshuffle(call: Call) -> Shape:
    """(…, C, H·r, W·r) to (…, C·r·r, H, W)."""
    x, r = call.shape("self"), call.integer("downscale_factor")
    *_, height, width = call.output_sizes()
    channels = product(x[-3], Var(r, call.name), Var(r, call.name))
    return (*x[:-3], channels, *_space(x, height, width))


def _space(x: Shape, height: int, width: int) -> Shape:
    for dim in x[-2:]:
        freeze_(dim, SPATIAL)
    return (Var(height, SPATIAL), Var(width, SPATIAL))


def channel_shuffle(call: Call) -> Shape:
    """(N, G·C, …) to (N, C·G, …): the channels of all groups in turn."""
    x = call.shape("self")
    groups = Var(call.integer("groups"))
    members = Var(x[1].size // groups.size)
    unify_(x[1], product(groups, members))
    call.edit("groups", lambda size: size(groups))
    return (x[0], product(members, groups), *x[2:])


def grid_sample(call: Call) -> Shape:
    """Input (N, C, H, W) at the points of a grid (N, H', W', 2) to (N, C, H', W')."""
    x, grid = call.shape("input"), call.shape("grid")
    unify_(x[0], grid[0])
    for dim in (*x[2:], *grid[1:]):
        freeze_(dim, SPATIAL)
    return (x[0], x[1], *grid[1:-1])
