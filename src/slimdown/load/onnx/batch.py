"""The batch size that an exporter wrote into a file, taken out again.

Exported with an example of one image and no dynamic batch, a file has Reshape to (1, 512) where the
network had x.flatten(1). Some images run through the steps alone and among others; where they turn
up again in memory tells where the batch is, so that the number can be replaced.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from slimdown.errors import BadInput
from slimdown.load.onnx.module import Held, OnnxModule, Source, Step, Values
from slimdown.load.onnx.numbers import Numbers, row
from slimdown.load.onnx.ops.shapes import reshape, resolve

TIMES = 3
"""By how much the other batch is larger."""
PLACE = 1
"""Which of these parts the images are that run alone."""
TOLERANCE = 1e-3


def free_batch_(module: OnnxModule) -> None:
    """Let a module take any batch size. Raises BadInput where a number cannot be replaced.

    Files that say that it is open are looked at, too: exported with a single image, some are not.
    Nothing is done where the file does not tell the image's size.
    """
    batch, sizes = module.batch_size or 1, [size for size in module.image_shape if size is not None]
    if len(sizes) < len(module.image_shape):
        return
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(TIMES * batch, *sizes, generator=generator)
    alone = module.start(images.narrow(0, PLACE * batch, batch))
    among = module.start(images)
    steps = []
    for each in module.steps:
        step = _undo_as_strided(each, alone, module)
        mended = _mend(step, alone, among)
        try:
            module.run_(step, alone)
            module.run_(mended, among)
        except BadInput:
            raise
        except Exception as error:  # torch's many words for shapes that do not fit
            raise _refusal(module, step.label) from error
        steps.append(mended)
    for name in module.outputs:
        if not _is_outermost(alone[name], among[name]):
            raise _refusal(module, f"the output {name!r}")
    module.steps = tuple(steps)


def _undo_as_strided(step: Step, values: Values, module: OnnxModule) -> Step:
    """A look-up of all numbers in their own order, as which as_strided is written: a Reshape."""
    if step.op != "Gather" or not isinstance(step.inputs[1], Held):
        return step
    index, data = module.read(step.inputs[1], values), module.read(step.inputs[0], values)
    counted = torch.arange(index.numel()).reshape(index.shape)
    if data.ndim != 1 or data.numel() != index.numel() or not torch.equal(index, counted):
        return step
    return replace(step, op="Reshape", call=reshape, inputs=(step.inputs[0], row(index.shape)))


def _mend(step: Step, alone: Values, among: Values) -> Step:
    """The step with sizes that do not follow the batch freed of it."""
    if step.op not in ("Reshape", "Expand") or not isinstance(step.inputs[0], str):
        return step
    x, y = alone[step.inputs[0]], among[step.inputs[0]]
    sizes, others = (_numbers_of(step.inputs[1], values) for values in (alone, among))
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)) or sizes is None or sizes != others:
        return step  # sizes that differ follow the batch already
    axis = next((axis for axis in range(x.ndim) if x.shape[axis] != y.shape[axis]), None)
    if axis is None:
        return step  # no batch in it
    mend = _mend_reshape if step.op == "Reshape" else _mend_expand
    mended = mend(list(sizes.values), x, y, axis, step)
    if tuple(mended) == sizes.values:
        return step
    return replace(step, inputs=(step.inputs[0], row(mended)))


def _numbers_of(source: Source, values: Values) -> Numbers | None:
    """Sizes that are constant, or that the graph computed."""
    found = values[source] if isinstance(source, str) else source
    return found if isinstance(found, Numbers) else None


def _mend_expand(sizes: list[int], x: Tensor, _: Tensor, axis: int, step: Step) -> list[int]:
    place = axis - x.ndim + len(sizes)
    if place >= 0 and sizes[place] == x.shape[axis]:
        sizes[place] = 1  # keeps the input's own
    return sizes


def _mend_reshape(sizes: list[int], x: Tensor, y: Tensor, axis: int, step: Step) -> list[int]:
    """The axis that the batch falls into takes the rest: -1."""
    asked = resolve(sizes, x, keeps_zero=bool(step.attributes.get("allowzero", 0)))
    known = math.prod(size for size in asked if size != -1)
    found = [x.numel() // known if size == -1 else size for size in asked]
    outside = _numbers_outside(x, y, axis)
    if outside is None:
        return sizes
    ends = [math.prod(found[: place + 1]) for place in range(len(found))]
    starts = [1, *ends[:-1]]
    within = [
        place
        for place, (start, end) in enumerate(zip(starts, ends, strict=True))
        if outside % start == end % outside == 0
    ]
    # An axis of its own begins where the batch does; but the last one is of features.
    own = [place for place in within if starts[place] == outside and place < len(found) - 1]
    place = next(iter((*own, *within)), None)
    if place is None or sizes[place] == -1 or (sizes[place] == 0 and place == axis):
        return sizes  # it is open already
    found[place] = -1
    return found


def _numbers_outside(x: Tensor, y: Tensor, axis: int) -> int | None:
    """How many numbers are counted outside of the batch, in the order of memory.

    The batch is in `axis`, alone or as a factor: of (tokens · N, C), the tokens are outside, too.
    """
    around = math.prod(x.shape[:axis])
    for factor in range(1, x.shape[axis] + 1):
        if x.shape[axis] % factor == 0 and _is_at(around * factor, x, y):
            return around * factor
    return None


def _is_at(outside: int, x: Tensor, y: Tensor) -> bool:
    return _are_close(y.reshape(outside, TIMES, -1)[:, PLACE], x.reshape(outside, -1))


def _is_outermost(alone: object, among: object) -> bool:
    """Whether an output of the images among others has theirs alone in its part of the batch."""
    if not (isinstance(alone, Tensor) and isinstance(among, Tensor)):
        return False
    if alone.ndim == 0 or among.shape != (TIMES * alone.shape[0], *alone.shape[1:]):
        return False
    size = len(alone)
    return _are_close(among[PLACE * size : (PLACE + 1) * size], alone)


def _are_close(a: Tensor, b: Tensor) -> bool:
    a, b = a.float(), b.float()
    largest = float(b.nan_to_num(0, 0, 0).abs().max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=TOLERANCE * max(largest, 1e-6), equal_nan=True)


def _refusal(module: OnnxModule, where: str) -> BadInput:
    return BadInput(
        f"{module.file} takes batches of {module.batch_size or 1} only, which is written into it, "
        f"and it cannot be taken out at {where}. Export it with a dynamic batch: torch.onnx.export("
        "model, (two_images,), file, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))"
    )
