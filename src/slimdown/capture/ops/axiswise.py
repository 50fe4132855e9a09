"""Operators that go by the numbering of a dimension's channels, which therefore stay whole.

Along all other axes they work on each channel by itself.
"""

from __future__ import annotations

from slimdown.capture.call import Call, Shape, Unsupported
from slimdown.capture.dims import Var, freeze_, unify_

ALONG_AXES = (
    "_log_softmax",
    "_softmax",
    "argsort",
    "cummax",
    "cummin",
    "cumprod",
    "cumsum",
    "fft_fft",
    "fft_fft2",
    "fft_fftn",
    "fft_fftshift",
    "fft_ifft",
    "fft_ifft2",
    "fft_ifftn",
    "fft_ifftshift",
    "fft_irfft",
    "fft_irfft2",
    "fft_irfftn",
    "fft_rfft",
    "fft_rfft2",
    "fft_rfftn",
    "flip",
    "log_softmax",
    "logcumsumexp",
    "roll",
    "softmax",
    "sort",
    "topk",
)


def along_axes(call: Call) -> Shape | list[Shape]:
    """Along the axes `dim` or `dims`, all where none is given: softmax, cumsum, sort, FFT, …"""
    x = call.input_shapes()[0]
    axes = call.axes(len(x))
    for axis in axes:
        freeze_(x[axis], call.name)

    def output(sizes: list[int]) -> Shape:
        if len(sizes) != len(x):
            raise Unsupported
        return tuple(
            Var(size, call.name) if axis in axes and size != dim.size else dim
            for axis, (dim, size) in enumerate(zip(x, sizes, strict=True))
        )

    if call.has_several_outputs:
        return [output(sizes) for sizes in call.outputs_sizes()]
    return output(call.output_sizes())


def diff(call: Call) -> Shape:
    """Differences of neighbors along an axis, of what `prepend` and `append` add to it, too."""
    x = call.shape("self")
    axis = call.axis("dim", len(x))
    for shape in call.input_shapes():
        freeze_(shape[axis], call.name)
        for dim, its in zip(
            x[:axis] + x[axis + 1 :], shape[:axis] + shape[axis + 1 :], strict=True
        ):
            unify_(dim, its)
    return (*x[:axis], Var(call.output_sizes()[axis], call.name), *x[axis + 1 :])


def triangle(call: Call) -> Shape:
    """The upper or lower triangle of the last two dims."""
    x = call.shape("self")
    for dim in x[-2:]:
        freeze_(dim, call.name)
    return x


def frozen_reduction(call: Call) -> Shape:
    """One value for all along some axes, such as where the largest is: `argmax`, `any`, …"""
    x = call.shape("self")
    axes = call.axes(len(x))
    for axis in axes:
        freeze_(x[axis], call.name)
    return reduced(call, x, axes)


def several_reductions(call: Call) -> list[Shape]:
    """The largest value along an axis and where it is, or the variance and the mean."""
    return [frozen_reduction(call)] * len(call.outputs_sizes())


def reduced(call: Call, x: Shape, axes: set[int]) -> Shape:
    """The dims that are left of `x`, with or without dims of size 1 for the others."""
    keepdim = "keepdim" in call.names and call.argument("keepdim")
    return tuple(
        Var(1) if axis in axes else dim for axis, dim in enumerate(x) if keepdim or axis not in axes
    )
