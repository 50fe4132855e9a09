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


@pytest.mark.parametrize("transposed", [False, True])
def test_the_operator_that_all_convolutions_decompose_to(apply, zeros, transposed):
    weight = zeros(6, 4, 3, 3) if transposed else zeros(4, 6, 3, 3)
    places = [1, 1], [0, 0], [1, 1]
    done = apply(
        aten.convolution.default, zeros(1, 6, 8, 8), weight, None, *places, transposed, [0, 0], 1
    )
    x, weight = done.inputs
    assert is_same(x[1], weight[0 if transposed else 1])
    assert is_same(done.output[1], weight[1 if transposed else 0])


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


def test_grouped_query_attention_ties_heads_of_queries_to_those_of_keys(apply, zeros):
    query, key = zeros(1, 6, 7, 8), zeros(1, 2, 5, 8)
    done = apply(aten.scaled_dot_product_attention.default, query, key, key, enable_gqa=True)
    q, k, v = done.inputs
    served, times = leaves(q[1])
    assert (served.size, times.size) == (2, 3)
    assert is_same(k[1], served)
    assert is_same(v[1], served)
    assert not is_frozen(times)
    assert is_same(done.output[1], q[1])


def test_causal_attention_keeps_its_positions(apply, zeros):
    x = zeros(1, 2, 5, 8)
    done = apply(aten.scaled_dot_product_attention.default, x, x, x, is_causal=True)
    assert reasons(done.inputs[0][2]) == {"causal attention"}


def test_products_with_vectors(apply, zeros):
    done = apply(aten.mv.default, zeros(4, 5), zeros(5))
    a, b = done.inputs
    assert is_same(a[1], b[0])
    assert done.output == (a[0],)
    done = apply(aten.dot.default, zeros(5), zeros(5))
    assert is_same(*(shape[0] for shape in done.inputs))
    assert done.output == ()
    done = apply(aten.outer.default, zeros(4), zeros(5))
    assert done.output == (done.inputs[0][0], done.inputs[1][0])


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (aten.addmm.default, [(6,), (3, 4), (4, 6)]),
        (aten.baddbmm.default, [(2, 3, 6), (2, 3, 4), (2, 4, 6)]),
        (aten.addbmm.default, [(3, 6), (2, 3, 4), (2, 4, 6)]),
    ],
)
def test_products_that_are_added_to_a_tensor(apply, zeros, op, shapes):
    done = apply(op, *(zeros(*shape) for shape in shapes))
    added, a, b = done.inputs
    assert is_same(a[-1], b[-2])
    assert is_same(done.output[-1], b[-1])
    assert is_same(done.output[-1], added[-1])
    assert is_same(done.output[-2], a[-2])


def test_einsum_ties_dims_of_the_same_letter(apply, zeros):
    done = apply(aten.einsum.default, "b h i d, b h j d -> b h i j", [zeros(2, 3, 4, 8)] * 2)
    a, b = done.inputs
    assert is_same(a[1], b[1])
    assert is_same(a[3], b[3])
    assert done.output == (a[0], a[1], a[2], b[2])
    assert done.call.mixes_channels
    (cost,) = done.call.costs
    assert torch.tensor([dim.size for dim in cost]).prod() == 2 * 3 * 4 * 4 * 8


def test_einsum_with_an_ellipsis_and_without_a_result(apply, zeros):
    done = apply(aten.einsum.default, "...ij,jk", [zeros(2, 3, 4, 5), zeros(5, 6)])
    a, b = done.inputs
    assert is_same(a[3], b[0])
    assert done.output == (*a[:3], b[1])
    done = apply(aten.einsum.default, "ba,ac", [zeros(4, 3), zeros(3, 5)])
    assert done.output == (done.inputs[0][0], done.inputs[1][1])


def test_einsum_over_a_diagonal_is_not_covered(apply, zeros):
    with pytest.raises(Unsupported):
        apply(aten.einsum.default, "ii->i", [zeros(3, 3)])


# --------------------------------------------------------------------------------- recurrent


def test_lstm_loses_hidden_units_of_all_gates_layers_and_directions(apply, zeros):
    model = torch.nn.LSTM(5, 6, num_layers=2, bidirectional=True, batch_first=True)
    parameters = [zeros(*parameter.shape) for parameter in model._flat_weights]
    states = [zeros(4, 2, 6), zeros(4, 2, 6)]
    done = apply(
        aten.lstm.input, zeros(2, 3, 5), states, parameters, True, 2, 0.0, False, True, True
    )
    x, h, c, *shapes = done.inputs
    (hidden,) = leaves(h[2])
    assert hidden.size == 6
    assert is_same(h[2], c[2])
    assert is_same(shapes[0][1], x[2])
    for weight in (shapes[0], shapes[4]):
        gates, units = leaves(weight[0])
        assert (gates.size, gates.reason) == (4, "lstm")
        assert units is hidden
    assert all(is_same(weight[1], hidden) for weight in (shapes[1], shapes[5]))
    assert is_same(shapes[8][1], concat(hidden, hidden))  # the second layer reads both directions
    output, *_ = done.output
    assert is_same(output[2], concat(hidden, hidden))
    assert not is_frozen(hidden)


def test_an_lstm_with_projections_is_not_covered(apply, zeros):
    model = torch.nn.LSTM(5, 6, proj_size=3)
    parameters = [zeros(*parameter.shape) for parameter in model._flat_weights]
    states = [zeros(1, 2, 3), zeros(1, 2, 6)]
    with pytest.raises(Unsupported):
        apply(
            aten.lstm.input, zeros(4, 2, 5), states, parameters, True, 1, 0.0, False, False, False
        )


# -------------------------------------------------------------------------------------- norm


def test_batch_norm_ties_its_statistics(apply, zeros):
    vectors = [zeros(6) for _ in range(4)]
    done = apply(aten.batch_norm.default, zeros(2, 6, 4, 4), *vectors, False, 0.1, 1e-5, False)
    x, *statistics = done.inputs
    assert all(is_same(statistic[0], x[1]) for statistic in statistics)
    assert not is_frozen(x[1])
    assert not done.call.mixes_channels


def test_standardized_weights_are_averaged_over_what_they_read(apply, zeros):
    weight = zeros(1, 6, 20)
    done = apply(aten.batch_norm.default, weight, None, None, None, None, True, 0.0, 1e-6, False)
    (x,) = done.inputs
    assert done.call.mixes_channels
    assert x[2] in done.call.spared
    assert not any(map(is_frozen, x[1:]))


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


def test_a_mean_over_channels_is_that_of_the_kept_ones(apply, zeros):
    done = apply(aten.mean.dim, zeros(2, 6, 4, 4), [1], True)
    (x,) = done.inputs
    assert not is_frozen(x[1])
    assert done.call.mixes_channels
    assert done.call.spared == [x[1]]


def test_a_sum_over_everything_spares_nothing(apply, zeros):
    done = apply(aten.sum.default, zeros(2, 6))
    assert done.output == ()
    assert done.call.mixes_channels
    assert not done.call.spared


@pytest.mark.parametrize("op", [aten.max.dim, aten.min.dim])
def test_where_an_extremum_is_tells_positions(apply, zeros, op):
    done = apply(op, zeros(2, 6), 1)
    assert is_frozen(done.inputs[0][1])
    assert done.output == [(done.inputs[0][0],)] * 2


def test_the_larger_of_two_tensors_is_pointwise(apply, zeros):
    done = apply(aten.max.other, zeros(2, 6), zeros(6))
    assert is_same(done.inputs[0][1], done.inputs[1][0])
    assert not done.call.mixes_channels


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (aten.cumsum.default, (1,)),
        (aten.flip.default, ([1],)),
        (aten.sort.default, (1,)),
        (aten.argsort.default, (1,)),
        (aten.topk.default, (3, 1)),
        (aten.fft_rfft.default, (None, 1)),
        (aten.argmax.default, (1, True)),
        (aten.logsumexp.default, ([1], True)),
        (aten.var_mean.correction, ([1],)),
    ],
)
def test_what_goes_by_numbering_freezes_its_axis_only(apply, zeros, op, args):
    options = {"keepdim": True} if op is aten.var_mean.correction else {}
    done = apply(op, zeros(2, 6, 4), *args, **options)
    (x,) = done.inputs
    assert [is_frozen(dim) for dim in x] == [False, True, False]
    for output in done.output if isinstance(done.output, list) else [done.output]:
        assert is_frozen(output[1])
        assert (output[0], output[2]) == (x[0], x[2])


def test_a_triangle_keeps_rows_and_columns(apply, zeros):
    done = apply(aten.triu.default, zeros(2, 4, 4), 1)
    assert [is_frozen(dim) for dim in done.inputs[0]] == [False, True, True]


def test_cosine_similarity(apply, zeros):
    done = apply(aten.cosine_similarity.default, zeros(2, 6), zeros(2, 6), 1)
    a, b = done.inputs
    assert is_same(a[1], b[1])
    assert done.output == (a[0],)


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


def test_a_conversion_to_the_type_of_another_tensor(apply, zeros):
    done = apply(aten.type_as.default, zeros(2, 6), zeros(9))
    assert done.output is done.inputs[0]


def test_tensors_that_are_broadcast_together(apply, zeros):
    done = apply(aten.broadcast_tensors.default, [zeros(6, 1), zeros(4)])
    a, b = done.inputs
    assert done.output == [(a[0], b[0])] * 2


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
    assert apply(aten.squeeze.dim, zeros(()), 0).output == ()


def test_a_dim_that_is_pruned_to_one_channel_is_not_dropped(apply, zeros):
    for op, *args in ((aten.squeeze.default,), (aten.squeeze.dims, [-1, 1, 2])):
        done = apply(op, zeros(2, 6, 3, 1), *args)
        (leaf,) = leaves(done.inputs[0][1])
        (edit,) = done.call.edits
        assert edit.target is aten.squeeze.dims
        given = args[0] if args else [0, 1, 2, 3]
        assert done.edited({leaf: 4})["dim"] == [axis % 4 for axis in given]
        assert done.edited({leaf: 1})["dim"] == [axis % 4 for axis in given if axis != 1]


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


@pytest.mark.parametrize("op", [aten.repeat.default, aten.tile.default])
def test_repeat_keeps_the_same_channels_in_every_copy(apply, zeros, op):
    done = apply(op, zeros(4), [2, 3])
    copies, channels = leaves(done.output[1])
    assert copies.size == 3
    assert is_same(channels, done.inputs[0][0])
    argument = "repeats" if op is aten.repeat.default else "dims"
    assert done.edited({copies: 2, channels: 1}) == {argument: [2, 2]}


def test_tiling_by_fewer_numbers_than_dims(apply, zeros):
    done = apply(aten.tile.default, zeros(2, 4), [3])
    (copies, channels) = leaves(done.output[1])
    assert done.output[0] is done.inputs[0][0]
    assert is_same(channels, done.inputs[0][1])
    assert done.edited({copies: 1}) == {"dims": [1]}


def test_repeated_neighbors(apply, zeros):
    done = apply(aten.repeat_interleave.self_int, zeros(2, 4), 3, 1, output_size=12)
    channels, copies = leaves(done.output[1])
    assert is_same(channels, done.inputs[0][1])
    assert done.edited({copies: 2, channels: 2}) == {"repeats": 2, "output_size": 4}


def test_views_as_another_tensor(apply, zeros):
    done = apply(aten.reshape_as.default, zeros(2, 12), zeros(2, 3, 4))
    x, other = done.inputs
    assert is_same(x[1], product(other[1], other[2]))
    assert all(is_same(a, b) for a, b in zip(done.output, other, strict=True))


def test_other_names_of_transposition(apply, zeros):
    for op in (aten.swapaxes.default, aten.swapdims.default):
        done = apply(op, zeros(2, 3, 4), 0, -1)
        assert done.output == done.inputs[0][::-1]
    done = apply(aten.movedim.intlist, zeros(2, 3, 4), [0, 1], [-1, 0])
    (x,) = done.inputs
    assert done.output == (x[1], x[2], x[0])
    done = apply(aten.mT.default, zeros(2, 3, 4))
    (x,) = done.inputs
    assert done.output == (x[0], x[2], x[1])


def test_complex_numbers_are_pairs(apply, zeros):
    done = apply(aten.view_as_complex.default, zeros(4, 2))
    assert done.output == (done.inputs[0][0],)
    assert is_frozen(done.inputs[0][1])
    done = apply(aten.view_as_real.default, torch.zeros(4, dtype=torch.complex64))
    assert done.output[0] is done.inputs[0][0]


# ----------------------------------------------------------------------------------- windows


def test_windows_of_an_image(apply, zeros):
    done = apply(aten.im2col.default, zeros(2, 6, 8, 8), [3, 3], [1, 1], [1, 1], [1, 1])
    channels, *kernel = leaves(done.output[1])
    assert is_same(channels, done.inputs[0][1])
    assert [(leaf.size, leaf.reason) for leaf in kernel] == [(3, "kernel")] * 2
    done = apply(aten.col2im.default, zeros(2, 24, 16), [8, 8], [2, 2], [1, 1], [0, 0], [2, 2])
    channels, *_ = leaves(done.inputs[0][1])
    assert is_same(channels, done.output[1])


def test_windows_along_one_axis(apply, zeros):
    done = apply(aten.unfold.default, zeros(2, 6, 8), 2, 4, 2)
    (x,) = done.inputs
    assert done.output[:2] == x[:2]
    assert [is_frozen(dim) for dim in x] == [False, False, True]
    assert all(map(is_frozen, done.output[2:]))


def test_pixels_and_channels(apply, zeros):
    done = apply(aten.pixel_shuffle.default, zeros(1, 24, 4, 4), 2)
    channels, *pixels = leaves(done.inputs[0][1])
    assert is_same(channels, done.output[1])
    assert not is_frozen(channels)
    assert [leaf.size for leaf in pixels] == [2, 2]
    done = apply(aten.pixel_unshuffle.default, zeros(1, 6, 8, 8), 2)
    assert next(leaves(done.output[1])) is done.inputs[0][1]


def test_shuffled_groups(apply, zeros):
    done = apply(aten.channel_shuffle.default, zeros(1, 12, 4, 4), 3)
    groups, members = leaves(done.inputs[0][1])
    assert (groups.size, members.size) == (3, 4)
    assert is_same(done.output[1], product(members, groups))
    assert done.edited({groups: 2}) == {"groups": 2}


def test_grid_sampling_passes_channels(apply, zeros):
    done = apply(aten.grid_sampler.default, zeros(1, 6, 4, 4), zeros(1, 3, 5, 2), 0, 0, False)
    x, grid = done.inputs
    assert done.output[1] is x[1]
    assert all(map(is_frozen, grid[1:]))


# ---------------------------------------------------------------------------------- creation


@pytest.mark.parametrize(("op", "args"), [(aten.zeros.default, ()), (aten.full.default, (0.5,))])
def test_a_constant_tensor_loses_channels_like_any_other(apply, op, args):
    done = apply(op, [2, 6], *args)
    (leaf,) = leaves(done.output[1])
    assert not is_frozen(leaf)
    assert done.edited({leaf: 4}) == {"size": [2, 4]}


def test_counting_tells_positions(apply):
    assert is_frozen(apply(aten.arange.default, 6).output[0])
    assert all(map(is_frozen, apply(aten.eye.default, 3).output))


@pytest.mark.parametrize(("indexing", "order"), [("ij", (0, 1)), ("xy", (1, 0))])
def test_mesh_grids(apply, zeros, indexing, order):
    done = apply(aten.meshgrid.indexing, [zeros(3), zeros(4)], indexing=indexing)
    dims = [shape[0] for shape in done.inputs]
    assert done.output == [tuple(dims[axis] for axis in order)] * 2


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


def test_every_second_channel_goes_with_its_neighbor(apply, zeros):
    done = apply(aten.slice.Tensor, zeros(2, 10), 1, 1, 2**63 - 1, 2)
    pairs, two = leaves(done.inputs[0][1])
    assert (pairs.size, two.size) == (5, 2)
    assert is_frozen(two)
    assert is_same(done.output[1], pairs)
    assert done.edited({pairs: 3}) == {"end": 6}


def test_slicing_with_a_step_that_does_not_divide_freezes(apply, zeros):
    done = apply(aten.slice.Tensor, zeros(2, 10), 1, 0, 10, 3)
    assert is_frozen(done.inputs[0][1])
    assert is_frozen(done.output[1])


def test_a_slice_beyond_the_end_is_empty(apply, zeros):
    done = apply(aten.slice.Tensor, zeros(2, 6), 1, 9, 2**63 - 1)
    assert [dim.size for dim in done.output] == [2, 0]
    (leaf,) = leaves(done.inputs[0][1])
    assert not is_frozen(leaf)
    assert done.edited({leaf: 4}) == {"start": 4, "end": 4}


def test_narrowing(apply, zeros):
    done = apply(aten.narrow.default, zeros(2, 10), 1, 3, 5)
    before, middle, _ = leaves(done.inputs[0][1])
    assert is_same(done.output[1], middle)
    assert done.edited({before: 1, middle: 4}) == {"start": 1, "length": 4}


def test_a_gated_linear_unit_keeps_the_same_of_both_halves(apply, zeros):
    done = apply(aten.glu.default, zeros(2, 10), 1)
    half, same = leaves(done.inputs[0][1])
    assert half is same
    assert is_same(done.output[1], half)


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


def test_differences_of_neighbors_tie_what_is_put_around_along_the_other_axes(apply, zeros):
    done = apply(aten.diff.default, zeros(2, 6, 3), 1, 2, zeros(2, 6, 1), zeros(2, 6, 4))
    x, *around = done.inputs
    for shape in around:
        assert is_same(shape[0], x[0])
        assert is_same(shape[1], x[1])
        assert is_frozen(shape[2])
    assert [is_frozen(dim) for dim in x] == [False, False, True]
    assert done.output[:2] == x[:2]
    assert is_frozen(done.output[2])


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (aten.mean.dim, ([0],)),
        (aten.softmax.int, (0,)),
        (aten.cumsum.default, (-1,)),
        (aten.movedim.int, (0, 0)),
    ],
)
def test_a_scalar_has_no_axes(apply, zeros, op, args):
    assert apply(op, zeros(()), *args).output == ()


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


# ----------------------------------------------------------------------------------- lookup

NUMBERS = torch.zeros(5, dtype=torch.long)


def test_indexing_freezes_the_table_and_passes_the_rest(apply, zeros):
    done = apply(aten.index.Tensor, zeros(9, 4), [NUMBERS])
    table, positions = done.inputs
    assert is_frozen(table[0])
    assert is_frozen(positions[0])
    assert done.output == (positions[0], table[1])
    assert not is_frozen(table[1])


def test_indexing_by_rows_and_columns(apply, zeros):
    rows, columns = NUMBERS[:, None], NUMBERS[:3]
    done = apply(aten.index.Tensor, zeros(4, 9, 8, 6), [None, rows, columns])
    x, *_ = done.inputs
    assert (done.output[0], done.output[3]) == (x[0], x[3])
    assert [is_frozen(dim) for dim in x] == [False, True, True, False]
    done = apply(aten.index.Tensor, zeros(4, 9, 8), [NUMBERS, None, NUMBERS])
    assert done.output[1] is done.inputs[0][1]  # axes that are no neighbors: positions come first


def test_indexing_by_a_mask_is_not_covered(apply, zeros):
    with pytest.raises(Unsupported):
        apply(aten.index.Tensor, zeros(2, 3), [torch.tensor([True, False])])


def test_writing_by_index(apply, zeros):
    done = apply(aten.index_put.default, zeros(4, 9), [None, NUMBERS], zeros(4, 5))
    x, _, values = done.inputs
    assert done.output is x
    assert is_same(values[0], x[0])
    assert is_frozen(x[1])
    assert not is_frozen(x[0])


def test_selecting_and_changing_some_channels(apply, zeros):
    done = apply(aten.index_select.default, zeros(4, 9), 1, NUMBERS)
    assert done.output == (done.inputs[0][0], done.inputs[1][0])
    done = apply(aten.index_add.default, zeros(4, 9), 1, NUMBERS, zeros(4, 5))
    x, _, source = done.inputs
    assert is_same(x[0], source[0])
    assert [is_frozen(dim) for dim in x] == [False, True]


def test_gathering_and_scattering_tie_the_other_axes(apply, zeros):
    where = torch.zeros(4, 5, dtype=torch.long)
    done = apply(aten.gather.default, zeros(4, 9), 1, where)
    x, found = done.inputs
    assert done.output is found
    assert is_same(x[0], found[0])
    assert is_frozen(x[1])
    done = apply(aten.scatter.src, zeros(4, 9), 1, where, zeros(4, 5))
    x, _, source = done.inputs
    assert done.output is x
    assert is_same(x[0], source[0])
    done = apply(aten.take_along_dim.default, zeros(4, 9), where[:1], 1)
    assert done.output[0] is done.inputs[0][0]


def test_gathering_from_a_part_freezes(apply, zeros):
    done = apply(aten.gather.default, zeros(4, 9), 1, torch.zeros(3, 5, dtype=torch.long))
    assert all(is_frozen(dim) for shape in done.inputs for dim in shape)


def test_an_embedding_loses_columns(apply, zeros):
    done = apply(aten.embedding.default, zeros(9, 6), NUMBERS)
    weight, indices = done.inputs
    assert done.output == (indices[0], weight[1])
    assert is_frozen(weight[0])
    assert not is_frozen(weight[1])


def test_one_hot_and_buckets(apply, zeros):
    done = apply(aten.one_hot.default, NUMBERS, 7)
    assert done.output[0] is done.inputs[0][0]
    assert is_frozen(done.output[1])
    done = apply(aten.bucketize.Tensor, zeros(4), zeros(6))
    assert done.output is done.inputs[0]
    assert is_frozen(done.inputs[1][0])


# ---------------------------------------------------------------------------------- the table


def test_every_line_of_the_table_names_an_operator():
    pytest.importorskip("torchvision")  # registers its own
    for name in TABLE:
        namespace, _, op = name.rpartition("::")
        assert hasattr(getattr(torch.ops, namespace or "aten"), op), name


def test_an_unknown_operator_has_no_rule():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    assert find_rule(graph.call_function(aten.linalg_inv.default, (x,))) is None
    assert find_rule(graph.call_function(aten.tanh.default, (x,))) is not None
