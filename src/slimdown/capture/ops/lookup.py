"""Looking values up by their positions: the axis that is looked up in keeps its numbering.

So a table of position biases, one a head, loses heads like any other tensor.
"""

from __future__ import annotations

from slimdown.capture.call import Call, Shape, Unsupported
from slimdown.capture.dims import Dim, Var, freeze_, unify_
from slimdown.capture.ops.pointwise import broadcast


def index(call: Call) -> Shape:
    """`x[:, rows, columns]`: the positions broadcast, and their dims take the place of the axes.

    That of the first one where the axes are neighbors, else the front.
    """
    return _looked_up(call)


def index_put(call: Call) -> Shape:
    """`x[:, rows, columns] = values`, where the values broadcast to what is looked up."""
    broadcast([_looked_up(call), call.shape("values")])
    return call.shape("self")


def _looked_up(call: Call) -> Shape:
    x, indices = call.shape("self"), call.argument("indices")
    axes = [axis for axis, each in enumerate(indices) if each is not None]
    positions = [call.shape_of(indices[axis]) for axis in axes]
    if not axes or any(each is None for each in positions):
        raise Unsupported
    if any(call.is_boolean(indices[axis]) for axis in axes):
        raise Unsupported  # a mask: how many it selects depends on its values
    for axis in axes:
        freeze_(x[axis], "index")
    found = broadcast([each for each in positions if each is not None])
    for dim in found:
        freeze_(dim, "index")
    others = [dim for axis, dim in enumerate(x) if axis not in axes]
    are_neighbors = axes == list(range(axes[0], axes[-1] + 1))
    first = axes[0] if are_neighbors else 0
    return (*others[:first], *found, *others[first:])


def index_select(call: Call) -> Shape:
    """Some channels of one axis."""
    x, axis = _axis_looked_up(call)
    (length,) = _frozen(call.shape("index"), call.name) or (Var(1),)
    return (*x[:axis], length, *x[axis + 1 :])


def index_change(call: Call) -> Shape:
    """`index_add`, `index_copy`, `index_fill`: change some channels of one axis."""
    x, axis = _axis_looked_up(call)
    _frozen(call.shape("index"), call.name)
    source = call.optional_shape("source")
    if source is not None and len(source) == len(x):
        _unify_others(x, source, axis, call.name)
    return x


def gather(call: Call) -> Shape:
    """For each position of `index` the value there along one axis; the output is as `index`."""
    x, axis = _axis_looked_up(call)
    found = call.shape("index")
    _unify_others(x, found, axis, call.name)
    return found


def take_along_dim(call: Call) -> Shape:
    """As `gather`, but the other axes broadcast."""
    x, axis = _axis_looked_up(call)
    found = call.shape("indices")
    if len(found) != len(x):
        raise Unsupported
    freeze_(found[axis], call.name)
    outer = broadcast([_without(x, axis), _without(found, axis)])
    return (*outer[:axis], found[axis], *outer[axis:])


def scatter(call: Call) -> Shape:
    """`scatter`, `scatter_add`, …: put values of `src` where `index` says, along one axis."""
    x, axis = _axis_looked_up(call)
    for name in ("index", "src"):
        other = call.optional_shape(name)
        if other is not None:
            _unify_others(x, other, axis, call.name)
    return x


def embedding(call: Call) -> Shape:
    """One row of `weight` (V, C) for each of the indices (…) to (…, C)."""
    weight = call.shape("weight")
    freeze_(weight[0], call.name)
    return (*_frozen(call.shape("indices"), call.name), weight[1])


def one_hot(call: Call) -> Shape:
    """(…) to (…, number of classes)."""
    return (*call.shape("self"), Var(call.output_sizes()[-1], call.name))


def among(call: Call) -> Shape:
    """`bucketize`, `isin`: each value by itself, against all of a table."""
    x, *tables = call.input_shapes()
    for table in tables:
        _frozen(table, call.name)
    if len(x) != len(call.output_sizes()):
        raise Unsupported
    return x


def _axis_looked_up(call: Call) -> tuple[Shape, int]:
    x = call.shape("self")
    if not x or call.argument("dim") is None:
        raise Unsupported
    axis = call.axis("dim", len(x))
    freeze_(x[axis], call.name)
    return x, axis


def _unify_others(x: Shape, other: Shape, axis: int, reason: str) -> None:
    """Along the other axes both go together, channel by channel, or one is a part of the other."""
    if len(x) != len(other):
        raise Unsupported
    freeze_(other[axis], reason)
    for a, b in zip(_without(x, axis), _without(other, axis), strict=True):
        if a.size == b.size:
            unify_(a, b)
        else:
            freeze_(a, reason)
            freeze_(b, reason)


def _without(shape: Shape, axis: int) -> tuple[Dim, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _frozen(shape: Shape, reason: str) -> Shape:
    for dim in shape:
        freeze_(dim, reason)
    return shape
