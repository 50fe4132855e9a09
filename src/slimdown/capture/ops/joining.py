"""Joining tensors along a dim, and taking them apart."""

from __future__ import annotations

import torch

from slimdown.capture.call import Call, Shape
from slimdown.capture.dims import Dim, Var, concat, freeze_, is_frozen, leaves, product, unify_


def cat(call: Call) -> Shape:
    """Join along one axis; along the others the inputs agree."""
    shapes = [shape for shape in call.list_of_shapes("tensors") if shape[0].size > 0]
    first = shapes[0]
    axis = call.axis("dim", len(first))
    for other in shapes[1:]:
        for index in set(range(len(first))) - {axis}:
            unify_(first[index], other[index])
    return _with(first, axis, concat(*(shape[axis] for shape in shapes)))


def stack(call: Call) -> Shape:
    """Join along a new axis, which is not pruned."""
    shapes = call.list_of_shapes("tensors")
    first = shapes[0]
    for other in shapes[1:]:
        for dim, its in zip(first, other, strict=True):
            unify_(dim, its)
    axis = call.axis("dim", len(first) + 1)
    return (*first[:axis], Var(len(shapes), "stack"), *first[axis:])


def split(call: Call) -> list[Shape]:
    """Take apart along one axis: `split`, `chunk` and their kin.

    Once pruned, the parts may differ in size, which only `split_with_sizes` can say.
    """
    x = call.shape("self")
    axis = call.axis("dim", len(x))
    parts = [Var(sizes[axis]) for sizes in call.outputs_sizes()]
    unify_(x[axis], concat(*parts))
    call.tie(*parts)
    source = call.argument("self")
    call.replace(
        torch.ops.aten.split_with_sizes.default,
        lambda size: {"self": source, "split_sizes": [size(part) for part in parts], "dim": axis},
    )
    return [_with(x, axis, part) for part in parts]


def unbind(call: Call) -> list[Shape]:
    """Take apart along one axis, dropping it; the graph goes on with each slice by itself."""
    x = call.shape("self")
    axis = call.axis("dim", len(x))
    freeze_(x[axis], "unbind")
    return [x[:axis] + x[axis + 1 :] for _ in call.outputs_sizes()]


def select(call: Call) -> Shape:
    """One slice along an axis, which therefore keeps its numbering."""
    x = call.shape("self")
    axis = call.axis("dim", len(x))
    freeze_(x[axis], "select")
    return x[:axis] + x[axis + 1 :]


def slice_(call: Call) -> Shape:
    """A run of channels along one axis, or every n-th of them."""
    x = call.shape("self")
    axis = call.axis("dim", len(x))
    whole, length = x[axis], call.output_sizes()[axis]
    if length == whole.size:
        return x
    start = 0 if call.argument("start") is None else call.integer("start")
    start = max(start + whole.size, 0) if start < 0 else min(start, whole.size)
    if (step := call.integer("step")) != 1:
        return _every_nth(call, x, axis, start=start, step=step)
    before, middle, _ = _run(whole, start, length)
    call.edit("start", lambda size: size(before))
    call.edit("end", lambda size: size(before) + size(middle))
    return _with(x, axis, middle)


def narrow(call: Call) -> Shape:
    """A run of channels along one axis, told by its start and length."""
    x = call.shape("self")
    axis = call.axis("dim", len(x))
    start = call.integer("start")
    start += x[axis].size if start < 0 else 0
    before, middle, _ = _run(x[axis], start, call.output_sizes()[axis])
    call.edit("start", lambda size: size(before))
    call.edit("length", lambda size: size(middle))
    return _with(x, axis, middle)


def _run(whole: Dim, start: int, length: int) -> tuple[Dim, Dim, Dim]:
    """What lies before a run of channels, the run itself, and what lies after it."""
    before, middle, after = Var(start), Var(length), Var(whole.size - start - length)
    unify_(whole, concat(before, middle, after))
    return before, middle, after


def _every_nth(call: Call, x: Shape, axis: int, *, start: int, step: int) -> Shape:
    """Every `step`-th channel, as of pairs: `step` neighbors stay or go together."""
    whole, length = x[axis], call.output_sizes()[axis]
    if step < 1 or whole.size % step or start >= step or length != whole.size // step:
        freeze_(whole, "slice with a step")
        return _with(x, axis, Var(length, "slice with a step"))
    outer = Var(length)
    unify_(whole, product(outer, Var(step, "slice with a step")))
    call.edit("end", lambda size: size(outer) * step)
    return _with(x, axis, outer)


def glu(call: Call) -> Shape:
    """One half of the channels times the sigmoid of the other half: both keep the same."""
    x = call.shape("self")
    axis = call.axis("dim", len(x))
    half = Var(x[axis].size // 2)
    unify_(x[axis], concat(half, half))
    return _with(x, axis, half)


def pad(call: Call) -> Shape:
    """Put constant channels before and after; those can be removed like any others.

    The padding of a dim that is frozen (a spatial one) is frozen with it.
    """
    x, amounts = call.shape("self"), call.integers("pad")
    is_constant = call.name == "constant_pad_nd" or call.argument("mode") == "constant"
    new = list(call.output_sizes())
    output = list(x)
    pads: list[Dim] = []
    for index in range(len(amounts) // 2):  # the last axis comes first
        axis = len(x) - 1 - index
        before, after = Var(amounts[2 * index]), Var(amounts[2 * index + 1])
        pads += [before, after]
        if before.size == after.size == 0:
            continue
        if not is_constant or before.size < 0 or after.size < 0:
            freeze_(x[axis], call.name)
            output[axis] = Var(new[axis], call.name)
            continue
        if is_frozen(x[axis]):
            reason = next(leaves(x[axis])).reason or call.name
            freeze_(before, reason)
            freeze_(after, reason)
        output[axis] = concat(before, x[axis], after)
        call.tie(before, after)
    call.edit("pad", lambda size: [size(amount) for amount in pads])
    return tuple(output)


def _with(shape: Shape, axis: int, dim: Dim) -> Shape:
    return (*shape[:axis], dim, *shape[axis + 1 :])
