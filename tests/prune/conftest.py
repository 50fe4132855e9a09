"""Small networks of every shape that pruning meets, and a reference that shares no code with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimdown.core import Batch
from slimdown.prune.plan import Plan


@pytest.fixture
def task_for() -> Callable[..., Any]:
    """A task without labels and without a score: all that pruning asks of one."""

    def make(*shape: int) -> Any:
        images = torch.randn(8, *shape, generator=torch.Generator().manual_seed(3))
        return SimpleNamespace(
            example_input=torch.randn(1, *shape),
            calibration_batches=lambda: [images],
            train_batches=lambda epoch: [Batch(images)],
        )

    return make


@pytest.fixture
def masked_outputs() -> Callable[[nn.Module, dict[str, Any], Tensor], Tensor]:
    """What `model` computes in float64 with zeros in the place of all that a plan removes.

    `structure` is the plan as JSON, or its tensors with the indices that each axis keeps. The
    independent reference: torch's own modules, no graph.
    """

    def run(model: nn.Module, structure: dict[str, Any], x: Tensor) -> Tensor:
        masked = copy.deepcopy(model).double().eval()
        slices = Plan.from_json(structure).slices if "version" in structure else structure
        with torch.no_grad():
            for name, weight in masked.named_parameters():
                for axis, kept in slices.get(name, {}).items():
                    gone = sorted(set(range(weight.shape[int(axis)])) - set(kept))
                    weight.index_fill_(int(axis), torch.tensor(gone), 0)
            return masked(x.double())

    return run


@pytest.fixture
def networks() -> dict[str, Callable[[], nn.Module]]:
    """Name -> a new network for (N, 8, 8, 8), with random weights everywhere."""
    return {name: lambda make=make: _randomized(make()) for name, make in NETWORKS.items()}


def _randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim == 1:
                noise = 0.4 * torch.randn(tensor.shape, generator=generator)
                tensor.copy_(noise.abs() + 0.5 if name.endswith("var") else 1 + noise)
    return model.eval()


class Sandwich(nn.Module):
    """A convolution, something in the middle, pooling and a classifier."""

    def __init__(self, middle: nn.Module, *, channels: int = 24, features: int = 24) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, channels, 3, padding=1)
        self.middle = middle
        self.last = nn.Linear(features, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(torch.relu(self.first(x)))
        return self.last(x.mean((2, 3)) if x.ndim == 4 else x)


class Shuffle(nn.Module):
    """ShuffleNet's unit: half of the channels pass, half are worked on, then both interleave."""

    def __init__(self) -> None:
        super().__init__()
        self.work = nn.Sequential(nn.Conv2d(12, 12, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        x = torch.cat([a, self.work(b)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.up(torch.relu(self.down(F.adaptive_avg_pool2d(x, 1))))
        return x * torch.sigmoid(scale)


class PaddedShortcut(nn.Module):
    """The CIFAR ResNet's shortcut: every second pixel, and zeros for the new channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(24, 40, 3, 2, 1)
        self.padding = 8

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return torch.relu(self.conv(x) + shortcut)


class Dense(nn.Module):
    """DenseNet's block: everything so far is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(24, 8, 1), nn.Conv2d(32, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, torch.relu(self.a(x))], 1)
        return torch.cat([x, self.b(x)], 1)


class Slices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b(x[:, 8:]), self.a(x[:, :8])], 1)


class Attention(nn.Module):
    """Self-attention as in timm: fused query, key and value."""

    def __init__(self, *, fused: bool = True) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 3, 8
        self.fused = fused
        self.norm = nn.LayerNorm(24)
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        n, length, _ = tokens.shape
        qkv = self.qkv(self.norm(tokens)).reshape(n, length, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q @ k.transpose(-2, -1)) * 8**-0.5).softmax(-1) @ v
        tokens = tokens + self.proj(y.transpose(1, 2).flatten(2))
        return tokens.mean(1)


class TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return (tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]).mean(1)


class Tied(nn.Module):
    """One convolution, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(24, 24, 1)
        self.b = nn.Conv2d(24, 24, 1, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class Scaled(nn.Module):
    """A layer scale, a constant that is no parameter, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(1e-6 * torch.ones(24, 1, 1))
        self.offset = torch.randn(24, 1, 1)
        self.register_buffer("factor", torch.rand(24, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.offset * self.factor.expand(-1, 8, 8)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(24, 24, 1)
        self.wide = nn.Sequential(nn.Conv2d(24, 32, 1), nn.ReLU(), nn.Conv2d(32, 24, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.conv(x).cumsum(1))


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 4).flatten(1)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: Sandwich(nn.Identity()),
    "batch norm": lambda: Sandwich(nn.Sequential(nn.BatchNorm2d(24), nn.ReLU())),
    "depthwise": lambda: Sandwich(nn.Conv2d(24, 24, 3, padding=1, groups=24)),
    "depth multiplier": lambda: Sandwich(nn.Conv2d(24, 48, 3, padding=1, groups=24), features=48),
    "grouped": lambda: Sandwich(nn.Conv2d(24, 48, 3, padding=1, groups=6), features=48),
    "transposed": lambda: Sandwich(nn.ConvTranspose2d(24, 16, 2, 2), features=16),
    "grouped transposed": lambda: Sandwich(nn.ConvTranspose2d(24, 16, 2, 2, groups=4), features=16),
    "prelu": lambda: Sandwich(nn.PReLU(24)),
    "shuffle": lambda: Sandwich(nn.Sequential(Shuffle(), Shuffle())),
    "squeeze and excite": lambda: Sandwich(SqueezeExcite()),
    "padded shortcut": lambda: Sandwich(PaddedShortcut(), features=40),
    "dense": lambda: Sandwich(Dense(), features=40),
    "slices": lambda: Sandwich(Slices()),
    "flat": lambda: Sandwich(Flat(), features=96),
    "attention": lambda: Sandwich(Attention()),
    "attention by matmul": lambda: Sandwich(Attention(fused=False)),
    "torch attention": lambda: Sandwich(TorchAttention()),
    "tied": lambda: Sandwich(Tied()),
    "scaled": lambda: Sandwich(Scaled()),
    "unknown": lambda: Sandwich(Unknown()),
    "group norm": lambda: Sandwich(nn.GroupNorm(4, 24)),
}


@pytest.fixture
def fake_clock() -> Callable[..., Any]:
    """A clock whose time follows from a formula: `fake_clock(milliseconds_of_an_operation)`.

    A network takes as long as its operators and `overhead_ms`; `asked` holds what it was asked for.
    """
    from slimdown.capture import analyze, capture
    from slimdown.prune.budget.cost import evaluate
    from slimdown.prune.budget.latency import timed_operators

    class FakeClock:
        runtime = "fake 1"

        def __init__(self, time: Any, *, overhead_ms: float = 0.0, round_to: int = 8) -> None:
            self.time, self.overhead_ms, self.round_to = time, overhead_ms, round_to
            self.asked: list[Any] = []

        def time_operations(self, operations: Any) -> list[float]:
            self.asked += operations
            return [self.time(each) for each in operations]

        def deploy(self, model: nn.Module, example_input: Tensor) -> Any:
            analysis = analyze(capture(model, example_input))
            operators = (
                each.at({c: evaluate(c, {}) for c in each.coordinates()})
                for each in timed_operators(analysis)
            )
            milliseconds = self.overhead_ms + sum(map(self.time, operators))
            return lambda inputs: milliseconds

        def time_networks(self, predicts: Any, example_input: Tensor) -> list[float]:
            return [predict(example_input) for predict in predicts]

    return FakeClock
