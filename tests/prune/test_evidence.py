from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from slimdown.capture import analyze, capture
from slimdown.capture.dims import is_frozen, leaves
from slimdown.core import Batch, Context
from slimdown.errors import BadInput, Interrupted, RecipeError
from slimdown.prune.importance.evidence import gather, gather_weights
from slimdown.prune.importance.gates import find_gates
from slimdown.prune.importance.lookout import MIN_DERIVATIVE_IMAGES, Lookout
from slimdown.prune.importance.observe import moments_of
from slimdown.prune.importance.projection import project
from slimdown.prune.sites import find_sites

EVERYTHING = ("noise", "weights", "scales", "inputs", "loss_gates", "output_gates")


@pytest.fixture
def analysis_of():
    return lambda model, *shape: analyze(capture(model, torch.zeros(1, *shape)))


def task_of(images, labels=None):
    """Images in batches of 5, with the cross-entropy of their labels."""
    targets = [None] * 99 if labels is None else labels.split(5)
    return SimpleNamespace(
        calibration_batches=lambda: images.split(5),
        train_batches=lambda epoch: list(map(Batch, images.split(5), targets)),
        loss=lambda outputs, batch: F.cross_entropy(outputs, batch.targets),
    )


def only_leaf(dim):
    (leaf,) = leaves(dim)
    return leaf


def activations_of(model, module, images):
    """What a module of the user's model reads."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen[0]


# ------------------------------------------------------------------------------------ the weights


def test_makers_and_readers_of_a_residual_stream(tiny_net, analysis_of):
    analysis = analysis_of(tiny_net, 3, 16, 16)
    leaf = only_leaf(analysis.tensors["down.weight"][0])
    evidence = gather(analysis, ["weights"], SimpleNamespace(), num_images=1)[leaf]
    made = [tiny_net.conv2.weight, tiny_net.down.weight]
    assert {w.shape for w in evidence.makers} == {w.shape for w in made}
    assert torch.equal(max(evidence.makers, key=torch.numel), made[0])
    (read,) = evidence.readers
    assert torch.equal(read, tiny_net.head.weight.T)


def test_a_depthwise_weight_is_made_not_read(networks, analysis_of):
    model = networks["depthwise"]()
    analysis = analysis_of(model, 8, 8, 8)
    leaf = only_leaf(analysis.tensors["first.weight"][0])
    evidence = gather(analysis, ["weights"], SimpleNamespace(), num_images=1)[leaf]
    assert [w.flatten(1).shape for w in evidence.makers] == [(24, 72), (24, 9)]
    assert [w.flatten(1).shape for w in evidence.readers] == [(24, 5)]


def test_a_product_with_a_parameter_is_a_layer(analysis_of):
    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.weight = nn.Linear(6, 8), nn.Parameter(torch.randn(8, 3))

        def forward(self, x):
            return torch.tanh(self.up(x)) @ self.weight

    model = Projected().double()
    images = torch.randn(8, 6, dtype=torch.float64)
    analysis = analyze(capture(model, images[:1]))
    leaf = only_leaf(analysis.tensors["up.weight"][0])
    task = task_of(images, torch.randint(3, (8,)))
    found = gather(analysis, EVERYTHING, task, num_images=8)[leaf]
    assert torch.equal(found.readers[0].double(), model.weight.float().double())
    assert torch.allclose(found.inputs[0].mean[:, 0], torch.tanh(model.up(images)).mean(0))
    squares = torch.zeros(8, dtype=torch.float64)
    for batch in task.train_batches(0):
        for image, label in zip(batch.inputs.split(1), batch.targets.split(1), strict=True):
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(image), label), [model.weight])
            squares += (model.weight * gradient).detach().sum(1).square()
    assert torch.allclose(found.loss_gates.mean_square, squares / 8)


@pytest.mark.parametrize("name", ["grouped", "grouped transposed"])
def test_the_channels_inside_of_groups(name, networks, analysis_of):
    model = networks[name]()
    analysis = analysis_of(model, 8, 8, 8)
    groups, inner = leaves(analysis.tensors["first.weight"][0])
    made, read = gather_weights(analysis, find_sites(analysis))
    weight = model.middle.weight.detach()
    by_group = weight.reshape(model.middle.groups, -1, *weight.shape[1:]).flatten(3)
    if name == "grouped":
        by_group = by_group.transpose(1, 2)  # (groups, read in a group, made in a group, kernel)
    read_squares = read[inner][0].flatten(1).square().sum(1)
    assert torch.allclose(read_squares, by_group.square().sum((0, 2, 3)))
    assert len(made[inner]) == 1  # by the first layer
    made_squares = made[groups][1].flatten(1).square().sum(1)
    assert torch.allclose(made_squares, by_group.square().sum((1, 2, 3)))
    assert len(read[groups]) == 1  # by the classifier: groups pass through the convolution


def test_a_weight_that_two_layers_share_counts_once(networks, analysis_of):
    model = networks["tied"]()
    analysis = analysis_of(model, 8, 8, 8)
    leaf = only_leaf(analysis.tensors["first.weight"][0])
    evidence = gather(analysis, ["weights"], SimpleNamespace(), num_images=1)[leaf]
    assert [w.flatten(1).shape for w in evidence.makers] == [(24, 72), (24, 24)]
    assert [w.flatten(1).shape for w in evidence.readers] == [(24, 24), (24, 5)]


def test_the_scales_of_batch_norms(networks, analysis_of):
    model = networks["batch norm"]()
    analysis = analysis_of(model, 8, 8, 8)
    leaf = only_leaf(analysis.tensors["first.weight"][0])
    evidence = gather(analysis, ["scales"], SimpleNamespace(), num_images=1)[leaf]
    (scale,) = evidence.scales
    assert torch.equal(scale, model.middle[0].weight)
    assert evidence.weights == ()


# -------------------------------------------------------------------------------- the activations


def test_moments_are_those_of_all_images_at_once(tiny_net, analysis_of):
    images = 3 + torch.randn(23, 3, 16, 16)
    analysis = analysis_of(tiny_net, 3, 16, 16)
    leaf = only_leaf(analysis.tensors["conv1.weight"][0])
    evidence = gather(analysis, ["inputs"], task_of(images), num_images=100)[leaf]
    (inputs,) = evidence.inputs
    read = activations_of(tiny_net, tiny_net.conv2, images).double().transpose(0, 1).flatten(1)
    assert torch.allclose(inputs.mean[:, 0], read.mean(1), rtol=1e-5)
    assert torch.allclose(inputs.mean_abs[:, 0], read.abs().mean(1), rtol=1e-5)
    assert torch.allclose(inputs.variance[:, 0], read.var(1, correction=0), rtol=1e-4)
    assert torch.allclose(inputs.root_mean_square[:, 0], read.square().mean(1).sqrt(), rtol=1e-4)
    weight = tiny_net.conv2.weight.transpose(0, 1).flatten(1)
    assert torch.equal(inputs.weight[:, 0], weight)


def test_moments_merge_far_from_zero():
    values = 1e4 + torch.randn(2, 64, dtype=torch.float64)
    merged = moments_of(values[:, :40], 0).merge(moments_of(values[:, 40:], 0))
    variance = values.float().double().var(1, correction=0)
    assert torch.allclose(merged.variance, variance, rtol=1e-2)


def test_as_many_images_as_asked_for(tiny_net, analysis_of):
    images = torch.randn(23, 3, 16, 16)
    analysis = analysis_of(tiny_net, 3, 16, 16)
    few = gather(analysis, ["inputs"], task_of(images), num_images=7)
    same = gather(analysis, ["inputs"], task_of(images[:7]), num_images=100)
    for leaf, evidence in few.items():
        for one, other in zip(evidence.inputs, same[leaf].inputs, strict=True):
            assert torch.allclose(one.variance, other.variance)


def test_a_flattened_channel_has_a_value_for_every_place(networks, analysis_of):
    model = networks["flat"]()
    images = torch.randn(10, 8, 8, 8)
    analysis = analysis_of(model, 8, 8, 8)
    leaf = only_leaf(analysis.tensors["first.weight"][0])
    (inputs,) = gather(analysis, ["inputs"], task_of(images), num_images=10)[leaf].inputs
    read = activations_of(model, model.last, images).double().view(10, 24, 4)
    assert torch.allclose(inputs.mean, read.mean(0), rtol=1e-5)
    assert torch.equal(inputs.weight, model.last.weight.view(5, 24, 4).permute(1, 2, 0))


def test_every_part_of_a_concatenation_has_its_own(networks, analysis_of):
    model = networks["dense"]()
    images = torch.randn(10, 8, 8, 8)
    analysis = analysis_of(model, 8, 8, 8)
    leaf = only_leaf(analysis.tensors["middle.a.weight"][0])
    evidence = gather(analysis, ["inputs", "weights"], task_of(images), num_images=10)[leaf]
    by_b, by_last = evidence.inputs
    read = activations_of(model, model.middle.b, images)[:, 24:32]
    assert torch.allclose(by_b.mean[:, 0], read.mean((0, 2, 3)).double(), rtol=1e-5)
    assert torch.equal(by_b.weight[:, 0], model.middle.b.weight[:, 24:32].squeeze().T)
    assert torch.equal(by_last.weight[:, 0], model.last.weight[:, 24:32].T)
    assert [w.flatten(1).shape for w in evidence.readers] == [(8, 8), (8, 5)]


def test_what_no_layer_reads_is_seen_where_it_is_made(analysis_of):
    model = Unread().eval()
    images = torch.randn(10, 4, 6)
    analysis = analysis_of(model, 4, 6)
    leaf = only_leaf(analysis.tensors["query.weight"][0])
    assert leaf is only_leaf(analysis.tensors["key.weight"][0])
    found = gather(analysis, EVERYTHING, task_of(images), num_images=10)[leaf]
    assert found.readers == ()
    assert len(found.makers) == len(found.inputs) == 2
    query = model.query(images).detach().double().flatten(0, 1)
    assert torch.allclose(found.inputs[0].mean[:, 0], query.mean(0), rtol=1e-5)
    assert torch.equal(found.inputs[0].weight, torch.ones(8, 1, 1))
    assert bool((found.output_gates.mean_square > 0).all())


def test_what_a_product_sums_over_has_a_gate_there_too(networks, analysis_of):
    """The width of a head: queries, keys and values lose it together."""
    model = networks["attention"]().double()
    images, labels = torch.randn(6, 8, 8, 8, dtype=torch.float64), torch.randint(5, (6,))
    analysis = analyze(capture(model, images[:1]))
    width = next(
        leaf for leaf in leaves(analysis.tensors["middle.proj.weight"][1]) if leaf.size == 8
    )
    found = gather(analysis, ["loss_gates"], task_of(images, labels), num_images=6)[width]
    rows = torch.arange(72).view(3, 3, 8)[0, :, 5]  # of the queries, in every head
    columns = torch.arange(24).view(3, 8)[:, 5]  # of the values, where they are read
    losses = []
    for amount in (1e-5, -1e-5):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.middle.qkv.weight[rows] *= 1 - amount
            changed.middle.qkv.bias[rows] *= 1 - amount
            changed.middle.proj.weight[:, columns] *= 1 - amount
            losses.append(F.cross_entropy(changed(images), labels, reduction="none"))
    change = (losses[0] - losses[1]) / 2e-5
    assert torch.allclose(found.loss_gates.mean_square[5], change.square().mean(), rtol=1e-4)


class Unread(nn.Module):
    """(N, 4, 6) -> (N, 4, 4): the product of queries and keys."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x):
        return self.query(x) @ self.key(x).transpose(1, 2)


# -------------------------------------------------------------------------------- the derivatives


def removed(model, layer, axis, channel, amount):
    """A copy in which a layer reads or makes a channel times 1 - amount."""
    changed = copy.deepcopy(model)
    weight = changed.get_submodule(layer).weight
    with torch.no_grad():
        weight.select(axis, channel).mul_(1 - amount)
    return changed


@pytest.mark.parametrize("layer", ["conv2", "head"])
def test_gates_tell_what_removing_a_little_of_a_channel_does_to_the_loss(
    layer, tiny_net, analysis_of
):
    model = tiny_net.double()
    images = torch.randn(12, 3, 16, 16, dtype=torch.float64)
    labels = torch.randint(4, (12,))
    analysis = analysis_of(model, 3, 16, 16)
    analysis.graph_module.double()
    leaf = only_leaf(analysis.tensors[f"{layer}.weight"][1])
    found = gather(analysis, ["loss_gates"], task_of(images, labels), num_images=12)[leaf]
    with torch.no_grad():
        for channel in (0, 5, 15):
            amount = 1e-5
            losses = [
                F.cross_entropy(each(images), labels, reduction="none")
                for each in (
                    removed(model, layer, 1, channel, amount),
                    removed(model, layer, 1, channel, -amount),
                )
            ]
            change = (losses[0] - losses[1]) / (2 * amount)
            assert torch.allclose(found.loss_gates.mean_abs[channel], change.abs().mean())
            assert torch.allclose(found.loss_gates.mean_square[channel], change.square().mean())


def test_gates_in_front_of_several_readers_close_together(networks, analysis_of):
    model = networks["dense"]().double()
    images, labels = torch.randn(6, 8, 8, 8, dtype=torch.float64), torch.randint(5, (6,))
    analysis = analysis_of(model, 8, 8, 8)
    leaf = only_leaf(analysis.tensors["middle.a.weight"][0])
    found = gather(analysis, ["loss_gates"], task_of(images, labels), num_images=6)[leaf]
    squares = torch.zeros(8, dtype=torch.float64)
    for sample in range(6):  # by every weight that reads the channel, one sample after the other
        loss = F.cross_entropy(model(images[sample : sample + 1]), labels[sample : sample + 1])
        weights = [model.middle.b.weight, model.last.weight]
        gradients = torch.autograd.grad(loss, weights)
        shares = [
            (w * g)[:, 24:32].flatten(2).sum((0, 2)) if w.ndim > 2 else (w * g)[:, 24:32].sum(0)
            for w, g in zip(weights, gradients, strict=True)
        ]
        squares += torch.stack(shares).sum(0).square().detach()
    assert torch.allclose(found.loss_gates.mean_square, squares / 6)


def test_gates_of_tokens_and_of_windows_belong_to_their_sample(analysis_of):
    model = Windows().double().eval()
    images, labels = torch.randn(6, 4, 4, 6, dtype=torch.float64), torch.randint(3, (6,))
    analysis = analysis_of(model, 4, 4, 6)
    leaf = only_leaf(analysis.tensors["up.weight"][0])
    found = gather(analysis, ["loss_gates"], task_of(images, labels), num_images=6)[leaf]
    squares = torch.zeros(8, dtype=torch.float64)
    for sample in range(6):
        loss = F.cross_entropy(model(images[sample : sample + 1]), labels[sample : sample + 1])
        (gradient,) = torch.autograd.grad(loss, [model.down.weight])
        squares += (model.down.weight * gradient).detach().sum(0).square()
    assert torch.allclose(found.loss_gates.mean_square, squares / 6)


class Windows(nn.Module):
    """(N, 4, 4, 6) -> (N, 3): layers over windows that lie along the batch, as in Swin."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        n = x.shape[0]
        windows = x.view(n, 2, 2, 2, 2, 6).transpose(2, 3).reshape(n * 4, 4, 6)
        y = self.down(torch.tanh(self.up(windows)))
        return y.view(n, 16, 3).mean(1)


def test_projections_tell_the_length_of_the_outputs_derivative():
    """For a linear network the mean over many signs is known: the squared change of the outputs."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).double()
    images = torch.randn(4000, 6, dtype=torch.float64)
    analysis = analyze(capture(model, torch.zeros(1, 6, dtype=torch.float64)))
    leaf = only_leaf(analysis.tensors["0.weight"][0])
    found = gather(analysis, ["output_gates"], task_of(images), num_images=4000)[leaf]
    hidden = model[0](images)
    spread = model(images[:5]).std(correction=0)
    apart = (hidden - hidden.mean(0)).square().mean(0)  # a closed gate gives the mean
    expected = apart * model[1].weight.square().sum(0) / (3 * spread**2)
    assert torch.allclose(found.output_gates.mean_square, expected.detach(), rtol=0.1)


def test_outputs_of_any_form_are_projected_alike():
    outputs = {"boxes": 1000 * torch.randn(5, 7), "scores": [torch.randn(5, 2, 3)], "count": 3}
    outputs["classes"] = torch.zeros(5, dtype=torch.int64)
    outputs["boxes"].requires_grad_()
    outputs["scores"][0].requires_grad_()
    loss = project(0)(outputs, Batch(torch.zeros(5, 1)))
    loss.backward()
    for each in (outputs["boxes"], outputs["scores"][0]):
        scaled = each.grad.abs() * each.std(correction=0)
        assert torch.allclose(scaled, torch.full_like(scaled, (5 / each.numel()) ** 0.5))


def test_images_without_labels_are_projected(tiny_net, analysis_of):
    images = torch.randn(8, 3, 16, 16)
    analysis = analysis_of(tiny_net, 3, 16, 16)
    found = gather(analysis, ["loss_gates"], task_of(images), num_images=8)
    assert all(bool((e.loss_gates.mean_square > 0).any()) for e in found.values())


# --------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", ["padded shortcut", "shuffle", "attention", "torch attention"])
def test_every_group_that_may_be_pruned_has_evidence(name, networks, analysis_of):
    analysis = analysis_of(networks[name](), 8, 8, 8)
    task = task_of(torch.randn(8, 8, 8, 8), torch.randint(5, (8,)))
    found = gather(analysis, EVERYTHING, task, num_images=8)
    assert found.keys() == {leaf for leaf in analysis.channels if not is_frozen(leaf)}
    for leaf, evidence in found.items():
        assert len(evidence.noise) == leaf.size
        assert all(len(weight) == leaf.size for weight in evidence.weights)
        assert evidence.weights
        assert evidence.inputs
        for gates in (evidence.loss_gates, evidence.output_gates):
            assert gates.mean_square.shape == gates.mean_abs.shape == (leaf.size,)
            assert bool((gates.mean_square > 0).any())


def test_the_same_seed_gives_the_same_and_draws_no_number_of_the_run(tiny_net, analysis_of):
    analysis = analysis_of(tiny_net, 3, 16, 16)
    images = torch.randn(8, 3, 16, 16)
    task = task_of(images)
    task.train_batches = lambda epoch: [Batch(images + torch.rand(1))]  # a task that augments
    before = torch.get_rng_state()
    one, other = (gather(analysis, EVERYTHING, task, num_images=8) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    another = gather(analysis, EVERYTHING, task, num_images=8, context=Context(seed=1))
    for leaf, evidence in one.items():
        assert torch.equal(evidence.noise, other[leaf].noise)
        assert not torch.equal(evidence.noise, another[leaf].noise)
        for gates in ("loss_gates", "output_gates"):
            square, again, new = (
                getattr(each[leaf], gates).mean_square for each in (one, other, another)
            )
            assert torch.equal(square, again)
            assert not torch.equal(square, new)


def test_no_other_devices_numbers_are_drawn(tiny_net, analysis_of, monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    task = task_of(torch.randn(5, 3, 16, 16))
    gather(analysis_of(tiny_net, 3, 16, 16), EVERYTHING, task, num_images=5)
    assert not seeded


@pytest.mark.parametrize("need", ["inputs", "loss_gates", "output_gates"])
def test_a_stop_is_heeded(tiny_net, analysis_of, need):
    task = task_of(torch.randn(5, 3, 16, 16), torch.randint(4, (5,)))
    context = Context(stop_requested=lambda: True)
    with pytest.raises(Interrupted, match="looking at images"):
        gather(analysis_of(tiny_net, 3, 16, 16), [need], task, num_images=5, context=context)


@pytest.mark.parametrize("need", ["inputs", "loss_gates", "output_gates"])
def test_outputs_that_are_no_numbers_are_refused(tiny_net, analysis_of, need):
    images = torch.randn(10, 3, 16, 16)
    images[7, 0] = torch.inf
    task = task_of(images, torch.randint(4, (10,)))
    with pytest.raises(BadInput, match=r"output 0 of this model, float32 \(5, 4\), holds NaN"):
        gather(analysis_of(tiny_net, 3, 16, 16), [need], task, num_images=10)


@pytest.mark.parametrize("name", ["down.weight", "bn.running_var"])
def test_weights_that_are_no_numbers_are_refused_by_name(tiny_net, analysis_of, name):
    tiny_net.state_dict()[name].view(-1)[3] = torch.inf
    with pytest.raises(BadInput, match=f"{name} of this model holds NaN or infinity"):
        gather(analysis_of(tiny_net, 3, 16, 16), ["weights"], task_of(None), num_images=1)


def test_infinity_in_a_mask_is_no_mistake(analysis_of):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.0]))

        def forward(self, x):
            return (self.down(self.up(x)) + self.mask).softmax(1)

    assert gather(analysis_of(Masked(), 6), EVERYTHING, task_of(torch.randn(8, 6)), num_images=8)


def test_labeled_images_are_as_many_as_asked_for(tiny_net, analysis_of):
    images, labels = torch.randn(23, 3, 16, 16), torch.randint(4, (23,))
    analysis = analysis_of(tiny_net, 3, 16, 16)
    few = gather(analysis, ["loss_gates"], task_of(images, labels), num_images=7)
    same = gather(analysis, ["loss_gates"], task_of(images[:7], labels[:7]), num_images=100)
    for leaf, evidence in few.items():
        assert torch.allclose(evidence.loss_gates.mean_abs, same[leaf].loss_gates.mean_abs)


def test_a_network_in_half_precision(tiny_net, analysis_of):
    model = copy.deepcopy(tiny_net).bfloat16()
    analysis = analyze(capture(model, torch.zeros(1, 3, 16, 16)))
    task = task_of(torch.randn(8, 3, 16, 16))
    rough = gather(analysis, ["inputs", "output_gates"], task, num_images=8)
    analysis = analysis_of(tiny_net, 3, 16, 16)
    exact = gather(analysis, ["inputs", "output_gates"], task, num_images=8)
    for one, other in zip(rough.values(), exact.values(), strict=True):
        for field in ("mean_abs", "mean_square"):
            ours, theirs = (getattr(each.output_gates, field) for each in (one, other))
            assert torch.allclose(ours, theirs, rtol=0.2, atol=0.05 * float(theirs.max()))
        assert torch.allclose(one.inputs[0].mean, other.inputs[0].mean, rtol=0.1, atol=0.05)


def test_the_model_is_left_alone(tiny_net, analysis_of):
    analysis = analysis_of(tiny_net, 3, 16, 16)
    state = copy.deepcopy(analysis.graph_module.state_dict())
    task = task_of(torch.randn(8, 3, 16, 16), torch.randint(4, (8,)))
    gather(analysis, EVERYTHING, task, num_images=8)
    for name, tensor in analysis.graph_module.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert all(p.grad is None for p in analysis.graph_module.parameters())


def test_a_value_that_is_overwritten_later_is_seen_as_it_was_read(analysis_of):
    class Overwriting(nn.Module):
        def __init__(self, relu):
            super().__init__()
            self.relu = relu
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.a(x)
            y = self.b(x)
            return self.c(y + self.relu(x))

    model = Overwriting(torch.relu_).double().eval()
    reference = copy.deepcopy(model)
    reference.relu = torch.relu
    images, labels = torch.randn(4, 6, dtype=torch.float64), torch.randint(3, (4,))
    analysis = analyze(capture(model, torch.zeros(1, 6, dtype=torch.float64)))
    leaf = only_leaf(analysis.tensors["a.weight"][0])
    found = gather(analysis, ["loss_gates"], task_of(images, labels), num_images=4)[leaf]
    squares = torch.zeros(8, dtype=torch.float64)
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        loss = F.cross_entropy(reference(image), label)
        weights = [reference.b.weight, reference.c.weight]
        gradients = torch.autograd.grad(loss, weights)
        shares = [(w * g).sum(0) for w, g in zip(weights, gradients, strict=True)]
        squares += torch.stack(shares).sum(0).square().detach()
    assert torch.allclose(found.loss_gates.mean_square, squares / 4)


def test_a_graph_of_one_batch_size_runs_image_by_image(analysis_of):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.down(self.up(x.view(1, -1)))

    analysis = analysis_of(Fixed(), 6)
    leaf = only_leaf(analysis.tensors["up.weight"][0])
    found = gather(analysis, EVERYTHING, task_of(torch.randn(7, 6)), num_images=7)[leaf]
    assert bool((found.output_gates.mean_square > 0).all())


def test_large_networks_are_differentiated_on_fewer_images(tiny_net, analysis_of):
    analysis = analysis_of(tiny_net, 3, 16, 16)
    task = task_of(torch.zeros(300, 3, 16, 16))
    small = Lookout(analysis, task, 300, Context())
    assert sum(len(batch.inputs) for batch in small.unlabeled()) == 300
    huge = SimpleNamespace(
        count_macs=lambda widths: 10**12,
        graph_module=analysis.graph_module,
        shapes={},
        batch_size=1,
    )
    large = Lookout(huge, task, 300, Context())
    assert sum(len(batch.inputs) for batch in large.unlabeled()) == MIN_DERIVATIVE_IMAGES
    assert sum(len(images) for images in large.images("look")) == 300


def test_progress_is_shown(tiny_net, analysis_of):
    shown = []
    task = task_of(torch.zeros(12, 3, 16, 16))
    context = Context(show=shown.append)
    gather(analysis_of(tiny_net, 3, 16, 16), ["inputs"], task, num_images=12, context=context)
    assert [(p.label, p.done, p.total) for p in shown] == [
        ("prune: look at activations", done, 12) for done in (0, 5, 10)
    ]


def test_a_task_without_images_says_so(tiny_net, analysis_of):
    task = SimpleNamespace(calibration_batches=lambda: [])
    with pytest.raises(RecipeError, match="looks at images, and the task has none"):
        gather(analysis_of(tiny_net, 3, 16, 16), ["inputs"], task, num_images=8)


def test_a_loss_that_fails_on_the_outputs_says_so(tiny_net, analysis_of):
    task = task_of(torch.zeros(8, 3, 16, 16), torch.zeros(8, dtype=torch.int64))
    task.loss = lambda outputs, batch: outputs["loss"]
    with pytest.raises(RecipeError, match=r"fails on what the network gives .* choose 'hessian'"):
        gather(analysis_of(tiny_net, 3, 16, 16), ["loss_gates"], task, num_images=8)


def test_outputs_without_a_derivative_say_so(analysis_of):
    class Signs(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return (self.down(self.up(x)) > 0).float()

    with pytest.raises(RecipeError, match=r"derivatives, which this network's outputs do not"):
        gather(analysis_of(Signs(), 6), ["output_gates"], task_of(torch.randn(8, 6)), num_images=8)


def test_a_network_that_says_nothing_yet_says_so(analysis_of):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    with pytest.raises(RecipeError, match=r"same outputs whatever it is shown.* such as 'l2'"):
        gather(analysis_of(model, 6), ["output_gates"], task_of(torch.randn(8, 6)), num_images=8)


def test_gates_stand_where_samples_run(networks, analysis_of):
    analysis = analysis_of(networks["depthwise"](), 8, 8, 8)
    leaf = only_leaf(analysis.tensors["first.weight"][0])
    (gate,) = find_gates(analysis, find_sites(analysis))[leaf]
    assert gate.node.args[1].target == "last.weight"
    assert not gate.on_output
