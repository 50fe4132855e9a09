"""Products that sum over a dimension: linear layers, matrix products, attention."""

from __future__ import annotations

from collections import Counter

from slimdown.capture.call import Call, Shape, Unsupported
from slimdown.capture.dims import Dim, Var, freeze_, product, unify_
from slimdown.capture.ops.pointwise import broadcast


def linear(call: Call) -> Shape:
    """Input (…, C) and weight (K, C) to (…, K)."""
    x, weight = call.shape("input"), call.shape("weight")
    bias = call.optional_shape("bias")
    if len(weight) != 2:
        raise Unsupported
    unify_(x[-1], weight[1])
    if bias is not None:
        unify_(bias[0], weight[0])
    call.cost(*x[:-1], *weight)
    call.layer("weight", weight[0])
    return (*x[:-1], weight[0])


def matmul(call: Call) -> Shape:
    """(…, M, K) times (…, K, N) to (…, M, N), the leading dims broadcast; `mm`, `bmm`, `dot`, …

    Of a vector, the dim M or N is missing.
    """
    first, second = list(call.names)[:2]
    output = _product(call, *call.operands())
    if len(call.shape(second)) > 1 and call.is_parameter(second):
        call.layer(second, output[-1])
    elif len(call.shape(first)) > 1 and call.is_parameter(first):
        call.layer(first, call.shape(first)[-2])
    return output


def added_product(call: Call) -> Shape:
    """`addmm` and `baddbmm`: a tensor that broadcasts, and the product of two others."""
    first, second = ("mat1", "mat2") if "mat1" in call.names else ("batch1", "batch2")
    output = _product(call, call.shape(first), call.shape(second))
    if call.is_parameter(second):
        call.layer(second, output[-1])
    return broadcast([output, call.shape("self")])


def added_sum_of_products(call: Call) -> Shape:
    """`addbmm`: the products of a batch of matrices, summed up."""
    output = _product(call, call.shape("batch1"), call.shape("batch2"))
    return broadcast([output[1:], call.shape("self")])


def _product(call: Call, a: Shape, b: Shape) -> Shape:
    if not a or not b:
        raise Unsupported
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else ()
    unify_(a[-1], b[-2] if len(b) > 1 else b[-1])
    outer = broadcast([a[:-2], b[:-2]])
    call.cost(*outer, *rows, a[-1], *columns)
    call.mix()
    return (*outer, *rows, *columns)


def outer_product(call: Call) -> Shape:
    """(M,) and (N,) to (M, N)."""
    a, b = call.operands()
    return (*a, *b)


def einsum(call: Call) -> Shape:
    """Dims with the same letter go together; a letter that the result lacks is summed over."""
    shapes = call.list_of_shapes("tensors")
    inputs, result = _labels(call.argument("equation"), [len(shape) for shape in shapes])
    dims: dict[str, Dim] = {}
    for labels, shape in zip(inputs, shapes, strict=True):
        for label, dim in zip(labels, shape, strict=True):
            (dims[label],) = broadcast([(dims.get(label, Var(1)),), (dim,)])
    for index, node in enumerate(call.argument("tensors")):
        elsewhere = {label for labels in inputs[:index] + inputs[index + 1 :] for label in labels}
        own = [dims[label] for label in inputs[index] if label in set(result) - elsewhere]
        if call.is_parameter(node):
            call.layer(node, product(*own))
    if len(shapes) > 1:
        call.cost(*dims.values())
    call.mix()
    return tuple(dims[label] for label in result)


def _labels(equation: str, ndims: list[int]) -> tuple[list[list[str]], list[str]]:
    """The labels of each input's dims and of the result's; those of an ellipsis are "-1", "-2", …

    Raises Unsupported for a diagonal, where an input has a label twice.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    inputs = [_spell(term, ndim) for term, ndim in zip(terms, ndims, strict=True)]
    if any(len(set(labels)) < len(labels) for labels in inputs):
        raise Unsupported
    hidden = max((len([x for x in labels if x[0] == "-"]) for labels in inputs), default=0)
    if arrow:
        return inputs, _spell(right, len(right.replace("...", "")) + hidden)
    count = Counter(letter for term in terms for letter in term if letter.isalpha())
    once = "".join(sorted(letter for letter, n in count.items() if n == 1))
    return inputs, _spell(f"...{once}", hidden + len(once))


def _spell(term: str, ndim: int) -> list[str]:
    before, ellipsis, after = term.partition("...")
    hidden = ndim - len(before) - len(after) if ellipsis else 0
    return [*before, *(str(index) for index in range(-hidden, 0)), *after]


def attention(call: Call) -> Shape:
    """Query (…, L, D), key (…, S, D) and value (…, S, E) to (…, L, E).

    The keys are softmaxed, so none of the S may go. Where D shrinks, the default scale 1/√D is
    pinned to its old value: the network was trained with that one. In grouped-query attention a
    head of keys and values serves several heads of queries: it can go with all of those, or each
    loses some.
    """
    query, key, value = call.shape("query"), call.shape("key"), call.shape("value")
    if not len(query) == len(key) == len(value):
        raise Unsupported
    width, outer = query[-1], _heads(call, query, key, value)
    unify_(width, key[-1])
    unify_(key[-2], value[-2])
    freeze_(key[-2], "softmax")
    if call.argument("is_causal"):
        freeze_(query[-2], "causal attention")
    scores: Shape = (*outer, query[-2], key[-2])
    attn_mask = call.optional_shape("attn_mask")
    if attn_mask is not None:
        broadcast([scores, attn_mask])
    if call.argument("scale") is None:
        call.edit("scale", lambda size: None if size(width) == width.size else width.size**-0.5)
        call.spare(width)
    call.cost(*scores, width)
    call.cost(*scores, value[-1])
    call.mix()
    return (*outer, query[-2], value[-1])


def _heads(call: Call, query: Shape, key: Shape, value: Shape) -> Shape:
    """The leading dims of the result, the last of which are the heads."""
    if not call.argument("enable_gqa"):
        return broadcast([query[:-2], key[:-2], value[:-2]])
    if len(query) < 3:
        raise Unsupported
    outer = broadcast([query[:-3], key[:-3], value[:-3]])
    for served in (key[-3], value[-3]):
        if query[-3].size % served.size:
            raise Unsupported
    unify_(key[-3], value[-3])
    unify_(query[-3], product(key[-3], Var(query[-3].size // key[-3].size)))
    return (*outer, query[-3])
