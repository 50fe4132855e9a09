"""What removed channels said is said again by the layers that are left, as far as it can be."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from slimdown.capture import analyze, capture
from slimdown.capture.dims import is_frozen, leaves
from slimdown.core import Context
from slimdown.errors import BadInput, Interrupted, RecipeError
from slimdown.load import ModelSource, load_model
from slimdown.prune import Prune
from slimdown.prune.compensation.compensate import compensate_
from slimdown.prune.compensation.norms import Statistics, renew, restore_statistics, statistics_of
from slimdown.prune.compensation.streams import arrange
from slimdown.prune.probe import relative_error
from slimdown.prune.surgery import prune_graph
from slimdown.quantize import Quantize

WEIGHTS = "weights/cifar10_resnet20.safetensors"


@pytest.fixture
def compensated():
    """Keep the first `width` channels of some layers, compensate: analysis, graph, what was done.

    Without layers, every second channel of all that can be pruned.
    """

    def run(model, images, *layers, width=0):
        analysis = analyze(capture(model.eval(), images[:1]))
        wanted = [layer.output for layer in analysis.layers if layer.name in layers]
        chosen = [leaf for dim in wanted for leaf in leaves(dim)] or analysis.channels
        kept = {
            leaf: torch.arange(leaf.size) < width if layers else torch.arange(leaf.size) % 2 == 0
            for leaf in chosen
            if not is_frozen(leaf)
        }
        pruned = prune_graph(analysis, kept)
        done = compensate_(pruned, analysis, kept, arrange(analysis, [images]))
        return analysis, pruned, done

    return run


def images(count=48, channels=8, size=8, seed=5):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def error(model, pruned, count=16):
    """Relative, on images that were never seen."""
    x = images(count, seed=6)
    with torch.no_grad():
        return relative_error([pruned(x)], [model(x)], sizes=[count])


# ------------------------------------------------------------------------ what is exactly known


class Chain(nn.Module):
    """A layer, something between, a layer that reads it."""

    def __init__(self, between, *, norm=None, bias=True):
        super().__init__()
        self.a = nn.Conv2d(8, 12, 3, padding=1)
        self.between = between
        self.b = nn.Conv2d(12, 6, 3, padding=1, bias=bias)
        self.norm = norm or nn.Identity()

    def forward(self, x):
        return self.norm(self.b(self.between(self.a(x))))


def test_channels_that_others_imply_are_restored(compensated):
    model = Chain(nn.Identity())
    with torch.no_grad():  # the last six are mixtures of the first six
        mixture = torch.randn(6, 6)
        model.a.weight[6:] = torch.einsum("ij,jchw->ichw", mixture, model.a.weight[:6])
        model.a.bias[6:] = mixture @ model.a.bias[:6]
    _, pruned, done = compensated(model, images(), "a", width=6)
    # At the border the bias is not padded, so that an edge pixel's mixture is not quite implied.
    assert done.facts["output_error"][1] < 1e-8
    assert error(model, pruned) < 1e-4


@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d(6)], ids=["bias", "running mean"])
def test_constant_channels_go_into_the_next_constant(compensated, norm):
    model = Chain(nn.ReLU(), norm=norm, bias=norm is None)
    model.b.padding = (0, 0)  # else the constant would not reach the border
    with torch.no_grad():
        model.a.weight[9:] = 0
        model.a.bias[9:] = torch.tensor([1.0, 2.0, 3.0])
    _, pruned, done = compensated(model, images(), "a", width=9)
    assert error(model, pruned) < 1e-5
    assert ("b.bias" if norm is None else "norm.running_mean") in done.tensors


def test_a_layer_that_cannot_take_a_constant_goes_without(compensated):
    model = Chain(nn.ReLU(), bias=False)
    *_, done = compensated(model, images(), "a", width=9)
    assert done.facts["layers"]["b"]["intercept"] is False
    assert done.tensors == ("b.weight",)
    assert done.facts["output_error"][1] < done.facts["output_error"][0]


def test_an_activation_is_fitted_behind_not_before(compensated, monkeypatch):
    model = nn.Sequential(
        nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1)
    )
    *_, behind = compensated(model, images(), "0", width=6)
    monkeypatch.setattr("slimdown.prune.compensation.fitting.MAX_ROUNDS", 0)
    *_, before = compensated(model, images(), "0", width=6)
    assert behind.facts["layers"]["2"]["error"][1] < 0.98 * before.facts["layers"]["2"]["error"][1]


def test_what_a_skip_connection_lost_is_made_good_by_the_branch(compensated):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.squeeze, self.expand = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
            self.branch = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            skip = self.expand(self.squeeze(x))  # cannot be right any more with three channels
            return skip + self.branch(x + 0 * skip)

    model = Residual()
    _, pruned, done = compensated(model, images(), "squeeze", width=3)
    assert done.facts["layers"]["expand"]["error"][1] > 0.01
    assert error(model, pruned) < 1e-4  # the branch sees all of x, and the whole is linear


# --------------------------------------------------------------------------- kinds of networks


@pytest.mark.parametrize(
    "name",
    [
        "batch norm",
        "depthwise",
        "depth multiplier",
        "grouped",
        "transposed",
        "grouped transposed",
        "shuffle",
        "squeeze and excite",
        "padded shortcut",
        "dense",
        "attention",
        "scaled",
        "group norm",
    ],
)
def test_every_kind_of_network_comes_closer_to_the_original(networks, compensated, name):
    model = networks[name]()
    _, pruned, done = compensated(model, images())
    before, after = done.facts["output_error"]
    assert after < before
    assert {"first", "last"} & done.facts["layers"].keys()
    for layer in done.facts["layers"].values():
        assert layer["error"][1] <= layer["error"][0]
    assert done.facts["seconds"] >= 0
    assert not any(parameter.grad is not None for parameter in pruned.parameters())


def test_a_weight_that_is_used_twice_is_left_alone(networks, compensated):
    *_, done = compensated(networks["tied"](), images())
    assert any("more than once" in why for why in done.facts["skipped"].values())
    assert "last.weight" in done.tensors
    assert not any(name.startswith("middle") for name in done.tensors)


def test_a_quantized_model_keeps_its_weights_and_says_why(tiny_net, task_for):
    task = task_for(3, 16, 16)
    quantized = Quantize()(tiny_net, task).model
    result = Prune(macs=0.7, importance="l2")(quantized, task)
    assert any("quantizer" in why for why in result.facts["compensation"]["skipped"].values())


def test_a_graph_with_a_fixed_batch_is_run_image_by_image(compensated):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 12, 3), nn.Linear(12 * 36, 5)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)).view(1, -1))

    *_, done = compensated(Fixed(), images(24), "a", width=8)
    assert done.facts["num_images"] + done.facts["num_held_out"] == 24
    assert done.facts["output_error"][1] < done.facts["output_error"][0]


# -------------------------------------------------------------------------------- batch norms


def test_restored_statistics_are_those_of_float64():
    old, new = (3 * images(6, seed=seed) + 7 for seed in (1, 2))
    new = 0.5 * new - 2
    running = Statistics(mean=torch.randn(8).double(), variance=torch.rand(8).double() + 0.5)
    found = restore_statistics(statistics_of(old.split(2)), statistics_of(new.split(4)), running)
    x, y = (each.double().numpy().transpose(1, 0, 2, 3).reshape(8, -1) for each in (old, new))
    np.testing.assert_allclose(statistics_of([old]).variance, x.var(1), rtol=1e-10)
    before = (x - running.mean.numpy()[:, None]) / np.sqrt(running.variance.numpy()[:, None])
    after = (y - found.mean.numpy()[:, None]) / np.sqrt(found.variance.numpy()[:, None])
    np.testing.assert_allclose(after.mean(1), before.mean(1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(after.std(1), before.std(1), rtol=1e-9)


def test_a_batch_norm_knows_the_statistics_of_what_it_reads(compensated):
    model = Chain(nn.ReLU(), norm=nn.BatchNorm2d(6), bias=False)
    seen = images()
    analysis, pruned, _ = compensated(model, seen, "a", width=6)
    state = {name: tensor.double() for name, tensor in pruned.state_dict().items()}
    x = torch.cat(arrange(analysis, [seen]).train).double()
    y = torch.relu(nn.functional.conv2d(x, state["a.weight"], state["a.bias"], padding=1))
    rows = nn.functional.conv2d(y, state["b.weight"], padding=1).transpose(0, 1).flatten(1)
    torch.testing.assert_close(state["norm.running_mean"], rows.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        state["norm.running_var"], rows.var(1, correction=0), rtol=1e-4, atol=1e-6
    )


def test_other_statistics_with_their_weights_are_the_same_function():
    norm, x = nn.BatchNorm2d(8).double().eval(), images(3).double()
    wanted = norm(x)
    old = Statistics(mean=norm.running_mean.clone(), variance=norm.running_var.clone())
    found = statistics_of([5 * x + 1])
    scale, shift = renew(old, found, eps=norm.eps)
    with torch.no_grad():
        norm.bias += norm.weight * shift
        norm.weight *= scale
    norm.running_mean, norm.running_var = found.mean, found.variance
    torch.testing.assert_close(norm(x), wanted, rtol=1e-10, atol=1e-10)


def test_a_channel_that_does_not_vary_keeps_its_variance():
    still = Statistics(mean=torch.ones(2).double(), variance=torch.zeros(2).double())
    moving = Statistics(mean=torch.zeros(2).double(), variance=torch.ones(2).double())
    found = restore_statistics(moving, still, moving)
    assert found.variance.tolist() == [1, 1]
    assert found.mean.tolist() == [1, 1]  # the mean follows the drift


def test_a_batch_norm_behind_a_layer_that_is_left_alone_follows_its_drift(compensated):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 12, 1, bias=False)
            self.norm, self.c = nn.BatchNorm2d(12), nn.Conv2d(12, 4, 1)

        def forward(self, x):
            y = torch.relu(self.a(x))
            return self.c(torch.relu(self.norm(self.b(y))) + self.b(y.square()))

    *_, done = compensated(Shared(), images(), "a", width=6)
    assert done.facts["skipped"].keys() == {"b"}
    assert "norm.running_mean" in done.tensors


# ------------------------------------------------------------------------------- the conditions


def test_the_same_images_give_the_same_weights(networks, compensated):
    model = networks["batch norm"]()
    first, second = (compensated(model, images())[1].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nothing_is_changed_where_held_out_images_would_lose(networks):
    model = networks["plain"]()
    analysis = analyze(capture(model, images(1)))
    kept = {
        leaf: torch.arange(leaf.size) % 2 == 0 for leaf in analysis.channels if not is_frozen(leaf)
    }
    pruned = prune_graph(analysis, kept)
    state = copy.deepcopy(pruned.state_dict())
    prepared = arrange(analysis, [images()])
    # What is learned from one constant color says nothing of the images held out.
    blank = tuple(torch.full_like(batch, 30.0) for batch in prepared.train)
    done = compensate_(
        pruned, analysis, kept, type(prepared)(train=blank, held_out=prepared.held_out)
    )
    before, after = done.facts["output_error"]
    changed = [
        name for name, tensor in pruned.state_dict().items() if not torch.equal(tensor, state[name])
    ]
    assert set(changed) <= set(done.tensors)
    assert after < before or not changed


def test_images_are_held_out_of_what_is_learned_from(networks, monkeypatch):
    analysis = analyze(capture(networks["plain"](), images(1)))
    found = arrange(analysis, [images(20), images(30, seed=9)], mirror=True)
    held_out, train = torch.cat(found.held_out), torch.cat(found.train)
    assert len(held_out) == 6
    assert len(train) == 2 * 44
    everything = {
        tuple(image.flatten()[:8].tolist()) for image in torch.cat([train, train.flip(-1)])
    }
    assert not any(tuple(image.flatten()[:8].tolist()) in everything for image in held_out)
    monkeypatch.setattr("slimdown.prune.compensation.streams.MAX_BYTES", 0)
    few = arrange(analysis, [images(20)], mirror=True)
    assert (len(few.train), len(few.held_out)) == (1, 1)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_are_refused(tiny_net, count):
    task = SimpleNamespace(
        example_input=torch.randn(1, 3, 16, 16),
        calibration_batches=lambda: [torch.randn(1, 3, 16, 16)] * count,
    )
    with pytest.raises(RecipeError, match=f"needs at least 2 calibration images, got {count};"):
        Prune(macs=0.5, importance="l2")(tiny_net, task)
    assert Prune(macs=0.5, importance="l2", compensate=False)(tiny_net, task).model


def test_images_that_are_no_numbers_are_refused(tiny_net, task_for):
    task = task_for(3, 16, 16)
    (x,) = task.calibration_batches()
    x[5, 0] = torch.nan
    with pytest.raises(BadInput, match=r"output 0 of this model, float32 .* holds NaN"):
        Prune(macs=0.5, importance="l2")(tiny_net, task)


def test_a_stop_is_heeded(tiny_net, task_for):
    with pytest.raises(Interrupted, match="compensating"):
        Prune(macs=0.5, importance="l2")(
            tiny_net, task_for(3, 16, 16), Context(stop_requested=lambda: True)
        )


def test_the_users_own_module_gets_the_weights_of_the_graph(tiny_net, task_for):
    task = task_for(3, 16, 16)
    plain, better = (
        Prune(macs=0.5, importance="l2", compensate=flag)(tiny_net, task) for flag in (False, True)
    )
    assert better.facts["delivery"] == "in_place"
    assert better.structure == plain.structure
    (x,) = task.calibration_batches()
    with torch.no_grad():
        wanted = [tiny_net(x)]
        errors = [
            relative_error([each.model(x)], wanted, sizes=[len(x)]) for each in (plain, better)
        ]
    assert errors[1] < errors[0]
    json_facts = better.facts["compensation"]
    assert json_facts["output_error"][1] < json_facts["output_error"][0]


def test_a_model_in_half_precision_stays_so(tiny_net, task_for):
    model = copy.deepcopy(tiny_net).to(torch.bfloat16)
    task = task_for(3, 16, 16)
    (x,) = task.calibration_batches()
    task = SimpleNamespace(
        example_input=x[:1].bfloat16(), calibration_batches=lambda: [x.bfloat16()]
    )
    result = Prune(macs=0.5, importance="l2")(model, task)
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}


@pytest.mark.data
def test_a_trained_network_keeps_most_of_its_accuracy(data_folder):
    # All on training images: the last 400 are judged on, and seen by nothing else here.
    path = Path(__file__).resolve().parents[2] / "recipes" / "models" / "cifar_resnet.py"
    model = load_model(ModelSource(f"{path}:resnet20", weights=data_folder / WEIGHTS))
    archive = np.load(data_folder / "cifar10_train4000.npz")
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    pixels = torch.from_numpy(archive["X"])[[*range(64), *range(3600, 4000)]]
    x = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    labels = torch.from_numpy(archive["Y"][3600:])
    task = SimpleNamespace(
        example_input=x[:1], calibration_batches=lambda: [x[:64]], train_batches=lambda epoch: []
    )
    accuracy = {}
    for compensate in (False, True):
        stage = Prune(macs=0.5, importance="l2", compensate=compensate)
        with torch.no_grad():
            predicted = stage(model, task).model(x[64:]).argmax(1)
        accuracy[compensate] = float((predicted == labels).float().mean())
    assert accuracy[True] > accuracy[False] + 0.4
