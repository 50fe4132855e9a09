"""Channels are scaled only together, and only where the network computes what it did."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from slimdown.capture import capture
from slimdown.quantize import Quantize
from slimdown.quantize.fold import fold_batch_norms
from slimdown.quantize.placement import plan_placement
from slimdown.quantize.profiles import PROFILES
from slimdown.quantize.rewrites.balance import Reading, balance
from slimdown.quantize.rewrites.channels import Channels, find_channels
from slimdown.quantize.rewrites.equalization import equalize, scale_channels, smooth


class Chain(nn.Module):
    """Two convolutions with `between`, and a layer on the pooled result."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first, self.between = nn.Conv2d(3, 8, 3, padding=1), between
        self.second, self.head = nn.Conv2d(8, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.between(self.first(x))).mean((2, 3)))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depthwise = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8)
        self.grouped, self.project = nn.Conv2d(8, 12, 1, groups=2), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.expand(x))))
        return self.project(self.grouped(x))


class Joined(nn.Module):
    """A shortcut, a concatenation, a split, padding, transposed convolution, shuffled channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.last = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = F.pad(F.max_pool2d(x + self.branch(x), 2), (1, 1, 1, 1))
        low, high = torch.cat([x, F.interpolate(self.up(x), size=x.shape[2:])], 1).chunk(2, 1)
        return self.last(F.channel_shuffle(torch.cat([high, low], 1), 2)).mean((2, 3))


class Gated(nn.Module):
    """Squeeze and excitation: one factor reaches both the gate and what it multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.last(x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None])


class Attentive(nn.Module):
    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.patches, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm2, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        qkv = self.qkv(self.norm(x)).reshape(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return self.head(self.norm2(x).mean(1))


class Shared(nn.Module):
    """One layer run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.last = (nn.Conv2d(c, 8, 1) for c in (3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.twice(torch.relu(self.twice(self.stem(x))))))


NETS: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: Chain(nn.ReLU()),
    "leaky": lambda: Chain(nn.LeakyReLU()),
    "clipped": lambda: Chain(nn.ReLU6()),
    "gelu": lambda: Chain(nn.GELU()),
    "groups": lambda: Chain(nn.GroupNorm(2, 8)),
    "depthwise": Depthwise,
    "joined": Joined,
    "gated": Gated,
    "attention": lambda: Attentive(fused=False),
    "fused attention": lambda: Attentive(fused=True),
    "shared": Shared,
}


@cache
def graph_of(name: str) -> tuple[GraphModule, Tensor]:
    torch.manual_seed(0)
    net = NETS[name]().eval()
    for module in net.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    images = torch.randn(4, 3, 16, 16)
    return fold_batch_norms(capture(net, images[:1])), images


def found_in(name: str) -> Channels:
    graph, images = graph_of(name)
    return find_channels(graph, images[:1])


@pytest.mark.parametrize("name", list(NETS))
@given(seed=st.integers(0, 2**32 - 1), octaves=st.floats(0, 6))
@settings(max_examples=5, deadline=None)
def test_any_factors_and_shifts_leave_the_function_as_it_was(
    name: str, seed: int, octaves: float
) -> None:
    graph, images = graph_of(name)
    graph, images = copy.deepcopy(graph).double(), images.double()
    channels = find_channels(graph, images[:1])
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(channels.count, generator=generator, dtype=torch.float64)
    factors = (2.0 ** (octaves * random)).index_fill(0, torch.tensor([0]), 1.0)
    shifts = torch.where(channels.can_shift, random, 0.0)
    before = copy.deepcopy(graph.state_dict())
    scaled = scale_channels(graph, channels, factors, shifts)
    with torch.no_grad():
        torch.testing.assert_close(scaled(images), graph(images), rtol=1e-9, atol=1e-9)
    assert [node.name for node in scaled.graph.nodes] == [node.name for node in graph.graph.nodes]
    assert all(torch.equal(before[key], value) for key, value in graph.state_dict().items())


@pytest.mark.parametrize(
    ("name", "count", "shiftable"),
    [
        ("chain", 8 + 6, 0),
        ("leaky", 8 + 6, 0),
        ("clipped", 6, 0),  # the bound of a ReLU6 has no factor
        ("gelu", 6, 0),
        ("groups", 8 + 6, 0),  # the norm's own; those that it reads must stay
        ("depthwise", 8 + 8 + 12, 0),
        ("joined", 8 + 4, 0),  # the shortcut makes one group of two layers' channels
        ("gated", 8, 0),
        ("attention", 8 + 8 + 8, 16),  # norms, and the values: of those no shift
        ("fused attention", 8 + 8 + 8, 16),
        ("shared", 0, 0),
    ],
)
def test_the_channels_that_can_be_scaled(name: str, count: int, shiftable: int) -> None:
    channels = found_in(name)
    assert channels.count - 1 == count
    assert int(channels.can_shift.sum()) == shiftable


def test_tied_weights_of_two_names_stay() -> None:
    net = Chain(nn.ReLU())
    net.second = nn.Conv2d(8, 8, 3, padding=1)
    net.head = nn.Linear(8, 4)
    third = nn.Conv2d(8, 8, 3, padding=1)
    third.weight = net.second.weight
    net.between = nn.Sequential(nn.ReLU(), third)
    graph = fold_batch_norms(capture(net.eval(), torch.randn(1, 3, 16, 16)))
    assert find_channels(graph, torch.randn(1, 3, 16, 16)).count == 1


def reading_of(x: Tensor, weight: Tensor, bits: int) -> Reading:
    """Of values (M, C_in), all channels free, and a weight (C_out, C_in / groups, ...)."""
    rows = weight.unsqueeze(-1).flatten(2)
    return Reading(
        channels=torch.arange(1, x.shape[1] + 1),
        low=x.amin(0),
        high=x.amax(0),
        mean=x.mean(0),
        square=x.square().mean(0),
        peaks=rows.abs().amax(2),
        squares=rows.square().sum(2),
        kernel_size=rows.shape[2],
        num_input_levels=2**bits,
        num_weight_levels=2**bits,
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_noise_is_that_of_rounding(groups: int, bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 8 // groups, 3, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(64, 8, 12, 12, generator=generator, dtype=torch.float64)
    x = (x * torch.arange(1, 9).view(-1, 1, 1)).clamp(min=0)
    levels = 2**bits
    rows = weight.flatten(2)
    reading = reading_of(x.movedim(1, -1).flatten(0, -2), weight, bits)
    step = x.amax() / (levels - 1)
    if symmetric:  # then the levels below zero are of no use to what a ReLU gives
        reading = replace(reading, symmetric=True, num_input_levels=levels - 1)
        step = x.amax() / (levels // 2 - 1)
    ones, zeros = torch.ones(9, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    # Noise of its own for each value: what rounding adds where values do not lie on a grid.
    noisy_x = x + step * (torch.rand(x.shape, generator=generator, dtype=x.dtype) - 0.5)
    steps = 2 * rows.abs().amax((1, 2)) / (levels - 1)
    spread = torch.rand(weight.shape, generator=generator, dtype=x.dtype) - 0.5
    noisy_weight = weight + steps.view(-1, 1, 1, 1) * spread

    def energy(lack: Tensor) -> float:
        return float(lack.square().mean((0, 2, 3)).sum())

    exact = F.conv2d(x, weight, groups=groups)
    measured = energy(F.conv2d(noisy_x, noisy_weight, groups=groups) - exact)
    told = reading.noise(ones, zeros) * float(reading.signal())
    assert told == pytest.approx(measured, rel=0.2)


@given(seed=st.integers(0, 2**32 - 1), bits=st.sampled_from([4, 8]))
@settings(max_examples=20, deadline=None)
def test_any_rescaling_is_undone(seed: int, bits: int) -> None:
    """What the channels were multiplied by before decides nothing about the noise in the end."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(100, 9, generator=generator, dtype=torch.float64)
    weight = torch.randn(16, 9, generator=generator, dtype=torch.float64)
    factors = 2.0 ** (1 + 5 * torch.rand(9, generator=generator, dtype=torch.float64))
    can_scale = torch.ones(10, dtype=torch.bool).index_fill(0, torch.tensor([0]), value=False)
    easy, hard = (reading_of(x * f, weight / f, bits) for f in (torch.ones(9), factors))
    noises = [each.noise(*balance([each], can_scale, ~can_scale)) for each in (easy, hard)]
    assert noises[1] < 1.2 * noises[0]
    ones, zeros = torch.ones(10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    assert noises[1] <= hard.noise(ones, zeros)


def test_the_rungs_keep_the_function() -> None:
    graph, images = graph_of("attention")
    placement = plan_placement(graph, PROFILES["openvino"])
    for rewrite in (equalize, smooth):
        rewritten = rewrite(graph, [images], placement)
        with torch.no_grad():
            torch.testing.assert_close(rewritten(images), graph(images), rtol=1e-4, atol=1e-5)


def test_dead_and_constant_channels_are_not_blown_up() -> None:
    graph, images = graph_of("chain")
    graph = copy.deepcopy(graph)
    with torch.no_grad():
        graph.get_parameter("first.weight")[:2] = 0
        graph.get_parameter("first.bias")[0] = -1  # dead behind the ReLU
        graph.get_parameter("first.bias")[1] = 1  # constant
        graph.get_parameter("second.weight")[:, 2] = 0  # read by nobody
    rewritten = equalize(graph, [images], plan_placement(graph, PROFILES["openvino"]))
    tensors = list(rewritten.state_dict().values())
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
    assert max(float(tensor.abs().max()) for tensor in tensors) < 1e4


def test_balance_leaves_what_gains_nothing() -> None:
    factors, shifts = balance([], torch.tensor([False, True]), torch.tensor([False, False]))
    assert factors.tolist() == [1.0, 1.0]
    assert shifts.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("name", "rung"), [("chain", "equalization"), ("attention", "smoothing")])
def test_a_network_made_hard_is_as_good_as_before(
    name: str, rung: str, make_task: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    net = NETS[name]().eval()
    task = make_task(torch.randn(48, 3, 16, 16).split(16))
    plain = Quantize(effort="balanced", weight_bits=8)(net, task).facts["ladder"]
    factors = 2.0 ** torch.linspace(1, 6, 8)
    with torch.no_grad():
        if name == "chain":
            net.first.weight.mul_(factors.view(-1, 1, 1, 1))
            net.first.bias.mul_(factors)
            net.second.weight.div_(factors.view(-1, 1, 1))
        else:
            net.norm.weight.mul_(factors)
            net.norm.bias.mul_(factors)
            net.qkv.weight.div_(factors)
    hard = Quantize(effort="balanced")(net, task).facts["ladder"]
    (step,) = [each for each in hard if each["rung"] == rung]
    assert step["kept"]
    assert hard[0]["error"] > 2 * plain[0]["error"]
    best = [min(each["error"] for each in steps) for steps in (plain, hard)]
    assert best[1] < 1.25 * best[0]
