"""The batch size that an exporter wrote into a file, taken out again.

Exported with an example of one image and no dynamic batch, a file has Reshape to (1, 512) where the
network had x.flatten(1). What the sizes are for one batch and for another tells where the batch is,
so that the number can be replaced.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from slimdown.errors import BadInput
from slimdown.load.onnx.module import OnnxModule, Step, Values
from slimdown.load.onnx.numbers import Numbers, row
from slimdown.load.onnx.ops.shapes import resolve

TIMES = 3
"""By how much the other batch is larger."""
TOLERANCE = 1e-3


def free_batch_(module: OnnxModule) -> None:
    """Let a module take any batch size. Raises BadInput where a number cannot be replaced.

    Nothing is done where the file leaves the batch size open, or does not tell the image's size.
    """
    batch, sizes = module._input_shape[0], module.image_shape
    if batch is None or None in sizes:
        return
    shape = [size for size in sizes if size is not None]
    _mend_(module, batch, shape)
    _verify(module, shape)


def _mend_(module: OnnxModule, batch: int, shape: Sequence[int]) -> None:
    twin = copy.deepcopy(module).to("meta")  # shapes are all that is looked at
    one, other = (
        twin.start(torch.empty(size, *shape, device="meta")) for size in (batch, TIMES * batch)
    )
    steps = []
    for step in module._steps:
        mended = _mend(step, one, other)
        try:
            twin.run_(step, one)
            twin.run_(mended, other)
        except BadInput:
            raise
        except Exception as error:  # torch's many words for shapes that do not fit
            raise BadInput(_refusal(module, batch, step.label)) from error
        steps.append(mended)
    module._steps = tuple(steps)


def _mend(step: Step, one: Values, other: Values) -> Step:
    """The step with its constant sizes freed of the batch."""
    if step.op not in ("Reshape", "Expand") or not isinstance(step.inputs[0], str):
        return step
    x, y, sizes = one[step.inputs[0]], other[step.inputs[0]], step.inputs[1]
    if not (isinstance(x, Tensor) and isinstance(y, Tensor) and isinstance(sizes, Numbers)):
        return step
    axis = next((axis for axis in range(x.ndim) if x.shape[axis] != y.shape[axis]), None)
    if axis is None:
        return step  # no batch in it
    mend = _mend_reshape if step.op == "Reshape" else _mend_expand
    return replace(step, inputs=(step.inputs[0], row(mend(list(sizes.values), x, axis, step))))


def _mend_reshape(sizes: list[int], x: Tensor, axis: int, step: Step) -> list[int]:
    """The axis that begins where the batch does in memory takes the rest: -1."""
    asked = resolve(sizes, x, keeps_zero=bool(step.attributes.get("allowzero", 0)))
    known = math.prod(size for size in asked if size != -1)
    found = [x.numel() // known if size == -1 else size for size in asked]
    before = math.prod(x.shape[:axis])
    places = [i for i in range(len(found)) if math.prod(found[:i]) == before]
    fitting = [i for i in places if found[i] % x.shape[axis] == 0] or places
    if not fitting:
        return sizes
    found[fitting[0]] = -1
    return found


def _mend_expand(sizes: list[int], x: Tensor, axis: int, step: Step) -> list[int]:
    place = axis - x.ndim + len(sizes)
    if place >= 0 and sizes[place] == x.shape[axis]:
        sizes[place] = 1  # keeps the input's own
    return sizes


def _verify(module: OnnxModule, shape: Sequence[int]) -> None:
    """Raise BadInput unless an image gives the same alone and among others."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(TIMES, *shape, generator=generator)
    together, alone = (_as_tuple(module.eval()(batch)) for batch in (images, images[1:2]))
    for name, all_of_them, own in zip(module._outputs, together, alone, strict=True):
        is_same = all_of_them.shape == (TIMES, *own.shape[1:]) and len(own) == 1
        if is_same:
            error = (all_of_them[1:2] - own).abs().max()
            is_same = bool(error <= TOLERANCE * own.abs().max().clamp(min=1e-6))
        if not is_same:
            raise BadInput(_refusal(module, module._input_shape[0], f"the output {name!r}"))


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _refusal(module: OnnxModule, batch: int | None, where: str) -> str:
    return (
        f"{module._file} takes batches of {batch} only, which is written into it, and it cannot be "
        f"taken out at {where}. Export it with a dynamic batch: torch.onnx.export(model, (image,), "
        "file, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))"
    )
