"""The same values in another shape: reshaping, permuting, expanding."""

from __future__ import annotations

import torch

from slimdown.capture.call import BATCH, Call, Shape, Unsupported
from slimdown.capture.dims import Dim, Var, freeze_, product, unify_


def reshape(call: Call) -> Shape:
    """`view` and `reshape`."""
    output = _regroup(call.shape("self"), call.output_sizes())
    call.edit_sizes("size" if "size" in call.names else "shape", output)
    return output


def reshape_as(call: Call) -> Shape:
    """`view_as` and `reshape_as`: the sizes are those of another tensor."""
    output = _regroup(call.shape("self"), call.output_sizes())
    for dim, other in zip(output, call.shape("other"), strict=True):
        unify_(dim, other)
    return output


def flatten(call: Call) -> Shape:
    """Merge neighboring dims; nothing in the graph tells their sizes."""
    return _regroup(call.shape("self"), call.output_sizes())


def unflatten(call: Call) -> Shape:
    """Take one dim apart."""
    x = call.shape("self")
    output = _regroup(x, call.output_sizes())
    call.edit_sizes("sizes", output, first=call.axis("dim", len(x)))
    return output


def _regroup(dims: Shape, sizes: list[int]) -> Shape:
    """The dims of a tensor of `dims` that is read in row-major order with `sizes`.

    Runs of dims and of sizes with equal products hold the same values: each is unified by itself.
    """
    output: list[Dim] = [Var(size) for size in sizes]
    olds, news = [d for d in dims if d.size != 1], [d for d in output if d.size != 1]
    while olds and news:
        old, new = [olds.pop(0)], [news.pop(0)]
        while (a := product(*old)).size != (b := product(*new)).size:
            source, run = (olds, old) if a.size < b.size else (news, new)
            if not source:
                raise Unsupported
            run.append(source.pop(0))
        unify_(b, a)
    return tuple(output)


def permute(call: Call) -> Shape:
    """Reorder the dims."""
    x = call.shape("self")
    return tuple(x[axis] for axis in call.integers("dims"))


def transpose(call: Call) -> Shape:
    """Swap two dims: `transpose`, `swapdims`, `swapaxes`."""
    x = list(call.shape("self"))
    kind = "dim" if "dim0" in call.names else "axis"
    a, b = call.axis(f"{kind}0", len(x)), call.axis(f"{kind}1", len(x))
    x[a], x[b] = x[b], x[a]
    return tuple(x)


def movedim(call: Call) -> Shape:
    """Move some dims to other places; the others keep their order."""
    x = call.shape("self")
    if not x:
        return x
    sources = [axis % len(x) for axis in call.integers("source")]
    places = [axis % len(x) for axis in call.integers("destination")]
    rest = iter([axis for axis in range(len(x)) if axis not in sources])
    order = [sources[places.index(n)] if n in places else next(rest) for n in range(len(x))]
    return tuple(x[axis] for axis in order)


def swap_last(call: Call) -> Shape:
    """`x.mT`."""
    *outer, rows, columns = call.shape("self")
    return (*outer, columns, rows)


def reverse(call: Call) -> Shape:
    """`x.T`."""
    return call.shape("self")[::-1]


def unsqueeze(call: Call) -> Shape:
    """Insert a dim of size 1."""
    x = call.shape("self")
    axis = call.axis("dim", len(x) + 1)
    return (*x[:axis], Var(1), *x[axis:])


def squeeze(call: Call) -> Shape:
    """Drop dims of size 1: all, or those given.

    Another of them that has one channel left once pruned is no longer given.
    """
    x, source = call.shape("self"), call.argument("self")
    listed = call.integers("dim") if "dim" in call.names else range(len(x))
    given = [axis % len(x) for axis in listed if x]
    dropped = [axis for axis in given if x[axis].size == 1]
    call.replace(
        torch.ops.aten.squeeze.dims,
        lambda size: {
            "self": source,
            "dim": [axis for axis in given if axis in dropped or size(x[axis]) != 1],
        },
    )
    return tuple(dim for axis, dim in enumerate(x) if axis not in dropped)


def expand(call: Call) -> Shape:
    """Broadcast to given sizes."""
    output = _expanded(call)
    call.edit_sizes("size", output)
    return output


def expand_as(call: Call) -> Shape:
    """Broadcast to the sizes of another tensor."""
    output = _expanded(call)
    for dim, other in zip(output, call.shape("other"), strict=True):
        unify_(dim, other)
    return output


def _expanded(call: Call) -> Shape:
    x, sizes = call.shape("self"), call.output_sizes()
    padded: Shape = (*(Var(1) for _ in sizes[len(x) :]), *x)
    return tuple(
        dim if dim.size == size else Var(size, BATCH if call.is_symbolic(axis) else None)
        for axis, (dim, size) in enumerate(zip(padded, sizes, strict=True))
    )


def repeat(call: Call) -> Shape:
    """Tile each dim; every copy keeps the same channels, and copies can go as a whole."""
    x, sizes = call.shape("self"), call.output_sizes()
    padded: Shape = (*(Var(1) for _ in sizes[len(x) :]), *x)
    argument = "repeats" if "repeats" in call.names else "dims"
    given = call.argument(argument)  # `tile` may list fewer numbers than there are dims
    copies = [
        Var(size // dim.size if dim.size else 1, None if isinstance(number, int) else BATCH)
        for number, dim, size in zip(
            [1] * (len(sizes) - len(given)) + list(given), padded, sizes, strict=True
        )
    ]
    call.edit(
        argument,
        lambda size: [
            size(copy) if isinstance(number, int) else number
            for number, copy in zip(given, copies[len(sizes) - len(given) :], strict=True)
        ],
    )
    return tuple(map(product, copies, padded))


def repeat_interleave(call: Call) -> Shape:
    """Repeat each channel of one axis: the copies are neighbors. Those of all can go alike."""
    x, times = call.shape("self"), call.argument("repeats")
    if call.argument("dim") is None or not isinstance(times, int):
        raise Unsupported
    axis = call.axis("dim", len(x))
    copies = Var(times)
    output = product(x[axis], copies)
    call.edit("repeats", lambda size: size(copies))
    if call.argument("output_size") is not None:
        call.edit("output_size", lambda size: size(output))
    return (*x[:axis], output, *x[axis + 1 :])


def view_as_complex(call: Call) -> Shape:
    """(…, 2) to (…), the pairs being real and imaginary parts."""
    *outer, pair = call.shape("self")
    freeze_(pair, call.name)
    return tuple(outer)


def view_as_real(call: Call) -> Shape:
    """(…) to (…, 2)."""
    return (*call.shape("self"), Var(2, call.name))
