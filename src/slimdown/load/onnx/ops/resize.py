"""Images made larger or smaller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn import functional as F

from slimdown.load.onnx.call import Call, Unsupported
from slimdown.load.onnx.numbers import Value

HALF_PIXEL = ("half_pixel", "pytorch_half_pixel")


def resize(call: Call) -> Value:
    """Resize the two axes of space as torch can: the forms that it lacks raise Unsupported."""
    call.require("antialias", 0)
    call.require("exclude_outside", 0)
    call.require("keep_aspect_ratio_policy", "stretch")
    x = call.tensor(0)
    scales = call.numbers(2) if call.has(2) else []
    sizes = call.numbers(3) if call.has(3) else []
    axes = call.attribute("axes")
    if axes is not None:
        scales, sizes = (_on_all_axes(given, axes, x.ndim) for given in (scales, sizes))
    if x.ndim != 4 or (scales and list(scales[:2]) != [1, 1]):
        raise Unsupported("of other axes than height and width")
    wanted: dict[str, Any] = {"size": list(sizes[2:])} if sizes else {"scale_factor": scales[2:]}
    mode = call.attribute("mode", "nearest")
    how = call.attribute("coordinate_transformation_mode", "half_pixel")
    if mode == "nearest":
        _check_nearest(call, how, scales[2:], sizes[2:], x.shape[2:])
        return F.interpolate(x, mode="nearest", **wanted)
    if how not in (*HALF_PIXEL, "align_corners"):
        raise Unsupported(f"with coordinate_transformation_mode={how!r}")
    if mode == "cubic":
        call.require("cubic_coeff_a", -0.75)
    name = {"linear": "bilinear", "cubic": "bicubic"}[mode]
    return F.interpolate(x, mode=name, align_corners=how == "align_corners", **wanted)


def _on_all_axes(given: list[Any], axes: list[int], ndim: int) -> list[Any]:
    placed = {axis % ndim: value for axis, value in zip(axes, given, strict=False)}
    return [placed.get(axis, 1) for axis in range(ndim)] if given else []


def _check_nearest(call: Call, how: str, scales: list[Any], sizes: list[Any], before: Any) -> None:
    """torch takes floor(i / scale); enlarged by a whole factor, all ways but one take the same."""
    rounding = call.attribute("nearest_mode", "round_prefer_floor")
    if how == "asymmetric" and rounding == "floor":
        return
    factors = scales or [new / old for new, old in zip(sizes, before, strict=True)]
    is_whole = all(factor >= 1 and float(factor).is_integer() for factor in factors)
    if how in HALF_PIXEL and rounding.startswith("round") and is_whole:
        return
    raise Unsupported(f"to the nearest with {how!r} and {rounding!r} by the factors {factors}")


TABLE: dict[str, Callable[[Call], Any]] = {"Resize": resize}
