"""The same values in another shape: reshaping, permuting, expanding."""

from __future__ import annotations

from slimdown.capture.call import BATCH, Call, Shape, Unsupported
from slimdown.capture.dims import Dim, Var, product, unify_


def reshape(call: Call) -> Shape:
    """`view` and `reshape`."""
    output = _regroup(call.shape("self"), call.output_sizes())
    call.edit_sizes("size" if "size" in call.names else "shape", output)
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
    """Swap two dims."""
    x = list(call.shape("self"))
    a, b = call.axis("dim0", len(x)), call.axis("dim1", len(x))
    x[a], x[b] = x[b], x[a]
    return tuple(x)


def reverse(call: Call) -> Shape:
    """`x.T`."""
    return call.shape("self")[::-1]


def unsqueeze(call: Call) -> Shape:
    """Insert a dim of size 1."""
    x = call.shape("self")
    axis = call.axis("dim", len(x) + 1)
    return (*x[:axis], Var(1), *x[axis:])


def squeeze(call: Call) -> Shape:
    """Drop dims of size 1: all, or those given."""
    x = call.shape("self")
    given = call.integers("dim") if "dim" in call.names else range(len(x))
    dropped = {axis % len(x) for axis in given if x[axis].size == 1}
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
    """Tile each dim; every copy keeps the same channels."""
    x, sizes = call.shape("self"), call.output_sizes()
    padded: Shape = (*(Var(1) for _ in sizes[len(x) :]), *x)
    return tuple(
        product(Var(size // dim.size, "repeat"), dim) if dim.size else dim
        for dim, size in zip(padded, sizes, strict=True)
    )
