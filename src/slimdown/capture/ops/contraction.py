"""Products that sum over a dimension: linear layers, matrix products, attention."""

from __future__ import annotations

from slimdown.capture.call import Call, Shape, Unsupported
from slimdown.capture.dims import freeze_, unify_
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
    """(…, M, K) times (…, K, N) to (…, M, N), the leading dims broadcast."""
    a, b = call.shape("self"), call.shape("other" if "other" in call.names else "mat2")
    if len(a) < 2 or len(b) < 2:
        raise Unsupported
    unify_(a[-1], b[-2])
    outer = broadcast([a[:-2], b[:-2]])
    call.cost(*outer, a[-2], a[-1], b[-1])
    call.mix()
    return (*outer, a[-2], b[-1])


def attention(call: Call) -> Shape:
    """Query (…, L, D), key (…, S, D) and value (…, S, E) to (…, L, E).

    The keys are softmaxed, so none of the S may go. Where D shrinks, the default scale 1/√D is
    pinned to its old value: the network was trained with that one.
    """
    if call.argument("enable_gqa"):
        raise Unsupported
    query, key, value = call.shape("query"), call.shape("key"), call.shape("value")
    if not len(query) == len(key) == len(value):
        raise Unsupported
    width = query[-1]
    unify_(width, key[-1])
    unify_(key[-2], value[-2])
    freeze_(key[-2], "softmax")
    outer = broadcast([query[:-2], key[:-2], value[:-2]])
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
