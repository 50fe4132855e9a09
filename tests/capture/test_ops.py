"""Each family of operators by itself: what its rule demands, and what it changes in the graph."""

from __future__ import annotations

import pytest
import torch

import slimdown.quantize.fake_quantize  # noqa: F401  (registers the operators)
from slimdown.capture.call import Unsupported
from slimdown.capture.dims import (
    concat,
    is_frozen,
    is_same,
    leaves,
    product,
    resolve,
)
from slimdown.capture.ops import TABLE, find_rule

aten = torch.ops.aten


def reasons(dim):
    return {leaf.reason for leaf in leaves(dim)}


# ------------------------------------------------------------------------------- convolution


def test_dense_convolution_ties_channels_to_its_weight(apply, zeros):
    done = apply(aten.conv2d.default, zeros(2, 6, 8, 8), zeros(4, 6, 3, 3), zeros(4))
    x, weight, bias = done.inputs
    assert is_same(x[1], weight[1])
    assert is_same(done.output[1], weight[0])
    assert is_same(bias[0], weight[0])
    assert is_same(done.output[0], x[0])
    assert all(map(is_frozen, (*weight[2:], *x[2:], *done.output[2:])))
    assert not is_frozen(weight[0])
    assert not is_frozen(weight[1])
    assert done.edited({}) == {"groups": 1}
    (cost,) = done.call.costs
    assert torch.tensor([dim.size for dim in cost]).prod() == 2 * (6 * 6) * (4 * 6 * 9)


def test_depthwise_convolution_has_one_dim_for_groups_and_channels(apply, zeros):
    done = apply(
        aten.conv2d.default, zeros(1, 6, 4, 4), zeros(6, 1, 3, 3), None, [1, 1], [1, 1], [1, 1], 6
    )
    x, weight = done.inputs
    assert is_same(x[1], weight[0])
    assert is_same(done.output[1], x[1])
    (leaf,) = leaves(x[1])
    assert done.edited({leaf: 4}) == {"groups": 4}


def test_depthwise_convolution_with_a_multiplier(apply, zeros):
    done = apply(
        aten.conv2d.default, zeros(1, 3, 4, 4), zeros(6, 1, 1, 1), None, [1, 1], [0, 0], [1, 1], 3
    )
    x, _ = done.inputs
    groups, multiplier = leaves(done.output[1])
    assert is_same(x[1], groups)
    assert multiplier.size == 2


def test_grouped_convolution_loses_whole_groups_or_channels_of_each(apply, zeros):
    done = apply(
        aten.conv2d.default, zeros(1, 6, 4, 4), zeros(9, 2, 1, 1), None, [1, 1], [0, 0], [1, 1], 3
    )
    x, weight = done.inputs
    groups, into = leaves(x[1])
    same_groups, out = leaves(weight[0])
    assert groups is same_groups
    assert is_same(into, weight[1])
    assert (groups.size, into.size, out.size) == (3, 2, 3)
    assert done.edited({groups: 2, out: 1}) == {"groups": 2}


def test_transposed_convolution(apply, zeros):
    done = apply(
        aten.conv_transpose2d.input,
        zeros(1, 6, 4, 4),
        zeros(6, 2, 2, 2),
        zeros(4),
        [2, 2],
        [0, 0],
        [0, 0],
        2,
    )
    x, weight, bias = done.inputs
    groups, out = leaves(done.output[1])
    assert is_same(x[1], weight[0])
    assert next(leaves(x[1])) is groups
    assert is_same(out, weight[1])
    assert is_same(bias[0], done.output[1])


def test_a_convolution_without_a_batch_is_not_covered(apply, zeros):
    with pytest.raises(Unsupported):
        apply(aten.conv2d.default, zeros(6, 8, 8), zeros(4, 6, 3, 3))


# ------------------------------------------------------------------------------- contraction


def test_linear(apply, zeros):
    done = apply(aten.linear.default, zeros(2, 5, 6), zeros(4, 6), zeros(4))
    x, weight, bias = done.inputs
    assert is_same(x[-1], weight[1])
    assert is_same(done.output[-1], weight[0])
    assert is_same(bias[0], weight[0])
    assert is_same(done.output[1], x[1])
    assert not is_frozen(weight[0])


@pytest.mark.parametrize("shapes", [((2, 3, 4, 5), (2, 3, 5, 6)), ((3, 4, 5), (5, 6))])
def test_matmul_ties_what_it_sums_over(apply, zeros, shapes):
    done = apply(aten.matmul.default, zeros(*shapes[0]), zeros(*shapes[1]))
    a, b = done.inputs
    assert is_same(a[-1], b[-2])
    assert is_same(done.output[-1], b[-1])
    assert is_same(done.output[-2], a[-2])
    assert done.call.mixes_channels


def test_batched_matmul(apply, zeros):
    done = apply(aten.bmm.default, zeros(3, 4, 5), zeros(3, 5, 6))
    a, b = done.inputs
    assert is_same(a[0], b[0])
    assert is_same(a[2], b[1])


def test_attention_freezes_keys_and_pins_the_scale(apply, zeros):
    query, key, value = zeros(2, 3, 7, 16), zeros(2, 3, 5, 16), zeros(2, 3, 5, 8)
    done = apply(aten.scaled_dot_product_attention.default, query, key, value)
    q, k, v = done.inputs
    assert is_same(q[1], k[1])
    assert is_same(q[1], v[1])
    assert is_same(q[3], k[3])
    assert reasons(k[2]) == reasons(v[2]) == {"softmax"}
    assert not any(map(is_frozen, (q[1], q[3], v[3])))
    assert is_same(done.output[3], v[3])
    (width,) = leaves(q[3])
    assert done.edited({}) == {"scale": None}
    assert done.edited({width: 8}) == {"scale": 16**-0.5}
    assert list(map(resolve, done.call.spared)) == [width]
    done = apply(aten.scaled_dot_product_attention.default, query, key, value, scale=0.1)
    assert not done.call.spared


def test_grouped_query_attention_is_not_covered(apply, zeros):
    query, key = zeros(1, 4, 7, 8), zeros(1, 2, 7, 8)
    with pytest.raises(Unsupported):
        apply(aten.scaled_dot_product_attention.default, query, key, key, enable_gqa=True)


# -------------------------------------------------------------------------------------- norm


def test_batch_norm_ties_its_statistics(apply, zeros):
    vectors = [zeros(6) for _ in range(4)]
    done = apply(aten.batch_norm.default, zeros(2, 6, 4, 4), *vectors, False, 0.1, 1e-5, False)
    x, *statistics = done.inputs
    assert all(is_same(statistic[0], x[1]) for statistic in statistics)
    assert not is_frozen(x[1])
    assert not done.call.mixes_channels


def test_layer_norm(apply, zeros):
    done = apply(aten.layer_norm.default, zeros(2, 5, 6), [6], zeros(6), zeros(6))
    x, weight, bias = done.inputs
    assert is_same(x[2], weight[0])
    assert is_same(x[2], bias[0])
    (leaf,) = leaves(x[2])
    assert done.edited({leaf: 4}) == {"normalized_shape": [4]}
    assert done.call.mixes_channels
    assert list(map(resolve, done.call.spared)) == [leaf]


def test_group_norm_loses_whole_groups_or_channels_of_each(apply, zeros):
    done = apply(aten.group_norm.default, zeros(2, 6, 4, 4), 3, zeros(6), zeros(6))
    x, weight, bias = done.inputs
    groups, members = leaves(x[1])
    assert (groups.size, members.size) == (3, 2)
    assert is_same(weight[0], x[1])
    assert is_same(bias[0], x[1])
    assert done.edited({groups: 2}) == {"num_groups": 2}
    assert list(map(resolve, done.call.spared)) == [members]


# ------------------------------------------------------------------------ pooling, reduction


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (aten.max_pool2d.default, ([2, 2],)),
        (aten.avg_pool2d.default, ([2, 2],)),
        (aten.adaptive_avg_pool2d.default, ([1, 1],)),
        (aten.upsample_nearest2d.vec, ([8, 8], None)),
        (aten.upsample_bilinear2d.vec, ([8, 8], False, None)),
    ],
)
def test_pooling_passes_channels_and_freezes_space(apply, zeros, op, args):
    done = apply(op, zeros(2, 6, 4, 4), *args)
    (x,) = done.inputs
    assert is_same(done.output[1], x[1])
    assert not is_frozen(x[1])
    assert all(map(is_frozen, (*x[2:], *done.output[2:])))


def test_pooling_with_indices_has_two_outputs(apply, zeros):
    done = apply(aten.max_pool2d_with_indices.default, zeros(2, 6, 4, 4), [2, 2])
    assert len(done.output) == 2
    assert all(is_same(shape[1], done.inputs[0][1]) for shape in done.output)


def test_softmax_freezes_its_axis(apply, zeros):
    done = apply(aten.softmax.int, zeros(2, 3, 4), -1)
    assert reasons(done.inputs[0][2]) == {"softmax"}
    assert not is_frozen(done.inputs[0][1])


@pytest.mark.parametrize(("keepdim", "ndim"), [(True, 4), (False, 2)])
def test_a_mean_over_space_passes_channels(apply, zeros, keepdim, ndim):
    done = apply(aten.mean.dim, zeros(2, 6, 4, 4), [2, 3], keepdim)
    (x,) = done.inputs
    assert len(done.output) == ndim
    assert is_same(done.output[1], x[1])
    assert not is_frozen(x[1])


def test_a_mean_over_channels_freezes_them(apply, zeros):
    done = apply(aten.mean.dim, zeros(2, 6, 4, 4), [1], True)
    assert reasons(done.inputs[0][1]) == {"mean"}


def test_a_sum_over_everything_freezes_everything(apply, zeros):
    done = apply(aten.sum.default, zeros(2, 6))
    assert all(map(is_frozen, done.inputs[0]))
    assert done.output == ()


# --------------------------------------------------------------------------------- pointwise


def test_pointwise_operators_broadcast(apply, zeros):
    done = apply(aten.mul.Tensor, zeros(2, 6, 4, 4), zeros(6, 1, 1))
    x, scale = done.inputs
    assert is_same(x[1], scale[0])
    assert all(is_same(a, b) for a, b in zip(done.output, x, strict=True))


def test_a_scale_of_size_one_stays_one(apply, zeros):
    done = apply(aten.add.Tensor, zeros(1, 6), zeros(4, 1))
    a, b = done.inputs
    assert is_same(done.output[0], b[0])
    assert is_same(done.output[1], a[1])


@pytest.mark.parametrize(
    "op",
    [
        aten.relu.default,
        aten.relu_.default,
        aten.gelu.default,
        aten.silu.default,
        aten.hardswish.default,
        aten.hardsigmoid.default,
        aten.clone.default,
        aten.detach_.default,
        aten.zeros_like.default,
    ],
)
def test_activations_and_copies_pass_every_dim(apply, zeros, op):
    done = apply(op, zeros(2, 6))
    assert all(is_same(a, b) for a, b in zip(done.output, done.inputs[0], strict=True))


def test_dropout_in_eval_mode_passes_every_dim(apply, zeros):
    done = apply(aten.dropout.default, zeros(2, 6), 0.5, False)
    assert is_same(done.output[1], done.inputs[0][1])


def test_prelu_with_a_slope_per_channel(apply, zeros):
    done = apply(aten.prelu.default, zeros(2, 6, 4), zeros(6))
    x, slope = done.inputs
    assert is_same(slope[0], x[1])


def test_fake_quantization_ties_scales_to_the_axis(apply, zeros):
    ops = torch.ops.slimdown
    zero_point = torch.zeros(6, dtype=torch.int32)
    done = apply(
        ops.fake_quantize_per_channel.default, zeros(6, 3), torch.ones(6), zero_point, 0, -127, 127
    )
    x, scale, offset = done.inputs
    assert is_same(scale[0], x[0])
    assert is_same(offset[0], x[0])
    done = apply(
        ops.fake_quantize_per_tensor.default,
        zeros(6, 3),
        torch.ones(()),
        zero_point[0],
        0,
        255,
    )
    assert is_same(done.output[0], done.inputs[0][0])


# --------------------------------------------------------------------------------- reshaping


def test_view_takes_a_dim_apart(apply, zeros):
    done = apply(aten.view.default, zeros(5, 24), [5, 3, 4, 2])
    (x,) = done.inputs
    three, four, two = done.output[1:]
    assert is_same(x[1], product(three, four, two))
    (leaf,) = leaves(four)
    assert done.edited({leaf: 2}) == {"size": [5, 3, 2, 2]}


def test_reshape_merges_dims_and_settles_minus_one(apply, zeros):
    done = apply(aten.reshape.default, zeros(5, 6, 2, 2), [5, -1])
    (x,) = done.inputs
    assert is_same(done.output[1], product(*x[1:]))
    (leaf,) = leaves(x[1])
    assert done.edited({leaf: 3}) == {"shape": [5, 12]}


def test_a_view_that_regroups_in_the_middle(apply, zeros):
    done = apply(aten.view.default, zeros(4, 6), [8, 3])
    (x,) = done.inputs
    four, two = leaves(done.output[0])
    assert is_same(x[0], four)
    assert is_same(x[1], product(two, done.output[1]))


def test_flatten_and_unflatten(apply, zeros):
    done = apply(aten.flatten.using_ints, zeros(5, 6, 2, 2), 1)
    assert is_same(done.output[1], product(*done.inputs[0][1:]))
    assert not done.call.edits
    done = apply(aten.unflatten.int, zeros(5, 24), -1, [3, 8])
    assert is_same(done.inputs[0][1], product(*done.output[1:]))
    (leaf,) = leaves(done.output[2])
    assert done.edited({leaf: 4}) == {"sizes": [3, 4]}


def test_permutations_move_dims(apply, zeros):
    done = apply(aten.permute.default, zeros(2, 3, 4), [2, 0, 1])
    (x,) = done.inputs
    assert done.output == (x[2], x[0], x[1])
    done = apply(aten.transpose.int, zeros(2, 3, 4), 1, -1)
    (x,) = done.inputs
    assert done.output == (x[0], x[2], x[1])
    done = apply(aten.t.default, zeros(2, 3))
    assert done.output == done.inputs[0][::-1]


def test_dims_of_size_one_come_and_go(apply, zeros):
    done = apply(aten.unsqueeze.default, zeros(2, 3), -1)
    assert done.output[:2] == done.inputs[0]
    done = apply(aten.squeeze.dim, zeros(2, 1, 3), 1)
    (x,) = done.inputs
    assert done.output == (x[0], x[2])
    done = apply(aten.squeeze.default, zeros(2, 1, 3, 1))
    assert len(done.output) == 2


def test_expand(apply, zeros):
    done = apply(aten.expand.default, zeros(1, 6), [4, -1])
    (x,) = done.inputs
    assert done.output[1] is x[1]
    (leaf,) = leaves(x[1])
    assert done.edited({leaf: 3}) == {"size": [4, 3]}
    done = apply(aten.expand_as.default, zeros(6, 1), zeros(2, 6, 5))
    x, other = done.inputs
    assert is_same(done.output[1], x[0])
    assert is_same(x[0], other[1])
    assert is_same(done.output[2], other[2])


def test_repeat_keeps_the_same_channels_in_every_copy(apply, zeros):
    done = apply(aten.repeat.default, zeros(4), [2, 3])
    copies, channels = leaves(done.output[1])
    assert copies.reason == "repeat"
    assert is_same(channels, done.inputs[0][0])


# ----------------------------------------------------------------------------------- joining


def test_cat_joins_one_axis_and_ties_the_others(apply, zeros):
    done = apply(aten.cat.default, [zeros(2, 3, 4), zeros(2, 5, 4)], 1)
    a, b = done.inputs
    assert is_same(done.output[1], concat(a[1], b[1]))
    assert is_same(a[2], b[2])


def test_stack_does_not_prune_the_new_axis(apply, zeros):
    done = apply(aten.stack.default, [zeros(2, 3), zeros(2, 3)], 1)
    a, b = done.inputs
    assert is_frozen(done.output[1])
    assert is_same(a[1], b[1])
    assert is_same(done.output[2], a[1])


@pytest.mark.parametrize(
    ("op", "argument", "sizes"),
    [
        (aten.chunk.default, 2, [5, 5]),
        (aten.split.Tensor, 4, [4, 4, 2]),
        (aten.split_with_sizes.default, [3, 7], [3, 7]),
        (aten.tensor_split.sections, 3, [4, 3, 3]),
    ],
)
def test_splits_become_explicit_sizes(apply, zeros, op, argument, sizes):
    done = apply(op, zeros(2, 10), argument, 1)
    (x,) = done.inputs
    parts = [shape[1] for shape in done.output]
    assert [part.size for part in parts] == sizes
    assert is_same(x[1], concat(*parts))
    (first,) = leaves(parts[0])
    edited = done.edited({first: 1})
    assert edited["split_sizes"] == [1, *sizes[1:]]
    assert done.call.edits[0].target is aten.split_with_sizes.default
    assert done.call.ties == [tuple(parts)]


def test_slicing_cuts_a_dim(apply, zeros):
    done = apply(aten.slice.Tensor, zeros(2, 10), 1, 3, -2)
    (x,) = done.inputs
    before, middle, after = leaves(x[1])
    assert (before.size, middle.size, after.size) == (3, 5, 2)
    assert is_same(done.output[1], middle)
    assert done.edited({before: 1, middle: 4}) == {"start": 1, "end": 5}


def test_slicing_with_a_step_freezes(apply, zeros):
    done = apply(aten.slice.Tensor, zeros(2, 10), 1, 0, 10, 2)
    assert is_frozen(done.inputs[0][1])
    assert is_frozen(done.output[1])


def test_a_whole_slice_changes_nothing(apply, zeros):
    done = apply(aten.slice.Tensor, zeros(2, 10), 1, 0, 2**63 - 1)
    assert done.output == done.inputs[0]
    assert not done.call.edits


@pytest.mark.parametrize(("op", "args"), [(aten.select.int, (1, 0)), (aten.unbind.int, (1,))])
def test_taking_single_slices_freezes_the_axis(apply, zeros, op, args):
    done = apply(op, zeros(2, 3, 4), *args)
    (x,) = done.inputs
    assert is_frozen(x[1])
    output = done.output[0] if isinstance(done.output, list) else done.output
    assert output == (x[0], x[2])


def test_indexing_freezes_the_table(apply, zeros):
    done = apply(aten.index.Tensor, zeros(9, 4), [torch.zeros(5, dtype=torch.long)])
    table = done.inputs[0]
    assert is_frozen(table[0])
    assert done.output[1] is table[1]
    assert not is_frozen(table[1])


def test_rolling_freezes_the_rolled_axis(apply, zeros):
    done = apply(aten.roll.default, zeros(2, 3, 4), [1], [1])
    assert [is_frozen(dim) for dim in done.inputs[0]] == [False, True, False]


def test_padded_channels_can_be_pruned_like_others(apply, zeros):
    done = apply(aten.pad.default, zeros(2, 6, 4, 4), [0, 0, 0, 0, 3, 3])
    (x,) = done.inputs
    before, middle, after = leaves(done.output[1])
    assert is_same(middle, x[1])
    assert not any(map(is_frozen, (before, middle, after)))
    assert done.edited({before: 1, middle: 2, after: 2}) == {"pad": [0, 0, 0, 0, 1, 2]}


def test_the_padding_of_a_frozen_dim_is_frozen(apply, zeros):
    done = apply(aten.pad.default, zeros(2, 6, 4, 4), [1, 1, 1, 1], reason="spatial")
    assert all(reasons(dim) == {"spatial"} for dim in done.output)


def test_padding_by_reflection_freezes(apply, zeros):
    done = apply(aten.pad.default, zeros(2, 6), [1, 1], "reflect")
    assert is_frozen(done.inputs[0][1])
    assert is_frozen(done.output[1])


# ---------------------------------------------------------------------------------- the table


def test_every_line_of_the_table_names_an_operator():
    for name in TABLE:
        namespace, _, op = name.rpartition("::")
        assert hasattr(getattr(torch.ops, namespace or "aten"), op), name


def test_an_unknown_operator_has_no_rule():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    assert find_rule(graph.call_function(aten.cumsum.default, (x, 1))) is None
    assert find_rule(graph.call_function(aten.tanh.default, (x,))) is not None
