"""Tiny networks of the shapes that blocks come in, on images (N, 3, 16, 16), and quantized ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimdown.capture import capture
from slimdown.quantize.assembly import Assembly, Network
from slimdown.quantize.fold import fold_batch_norms
from slimdown.quantize.placement import Placement, label_of, plan_placement
from slimdown.quantize.profiles import PROFILES


@pytest.fixture
def make_net() -> Callable[[str], nn.Module]:
    def make(name: str) -> nn.Module:
        return NETS[name]().eval()

    return make


@pytest.fixture
def assemble() -> Callable[..., tuple[Network, Placement]]:
    """Quantize a model, all its weights with `bits`, from batches of images."""

    def build(
        model: nn.Module, batches: Sequence[Tensor], *, bits: int, profile: str = "openvino"
    ) -> tuple[Network, Placement]:
        graph = fold_batch_norms(capture(model, batches[0][:1]))
        levels = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        placement = plan_placement(graph, replace(PROFILES[profile], weight_range=levels))
        build_from = Assembly(
            placement=placement,
            labels={node.name: label_of(node) for node in graph.graph.nodes},
            calibration="minmax",
            images=lambda: batches,
            after_batch=lambda count: None,
        )
        return build_from(graph), placement

    return build


def conv(ins: int, outs: int) -> nn.Conv2d:
    return nn.Conv2d(ins, outs, 3, padding=1)


class Chain(nn.Module):
    """Five layers in a row, with a pooling behind the fourth."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 4), conv(4, 4), conv(4, 4), conv(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c, self.d):
            x = F.relu(layer(x))
        return self.head(x.mean((2, 3))).softmax(-1)


class Residual(nn.Module):
    """A stem, a block with a convolution on its shortcut, a block without, and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 4)
        self.a, self.b, self.down = conv(4, 8), conv(8, 8), nn.Conv2d(4, 8, 1)
        self.c, self.d = conv(8, 8), conv(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem((x - 0.5) / 0.2))
        x = F.relu(self.b(F.relu(self.a(x))) + self.down(x))
        x = F.relu(self.d(F.relu(self.c(x))) + x, inplace=True)
        return self.head(x.mean((2, 3)))


class ViT(nn.Module):
    """Patches with a class token, whose copies are as many as there are images; two layers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.layers = nn.ModuleList(ViTLayer(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


class ViTLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def heads(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        return x.view(n, length, 2, width // 2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (self.heads(each(y)) for each in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(y)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Hourglass(nn.Module):
    """A U-Net of three levels: no cut from the first shortcut's begin to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = conv(3, 4), conv(4, 1)
        self.down = nn.ModuleList(conv(4, 4) for _ in range(6))
        self.up = nn.ModuleList(conv(ins, 4) for ins in (8, 4, 8, 4, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        kept = []
        for level in range(3):
            kept.append(x)
            x = F.relu(self.down[2 * level](x))
            x = F.max_pool2d(F.relu(self.down[2 * level + 1](x)), 2)
        for level, wide in enumerate(reversed(kept)):
            x = torch.cat([F.interpolate(x, scale_factor=2.0), wide], 1)
            x = F.relu(self.up[2 * level + 1](F.relu(self.up[2 * level](x))))
        return self.last(x)


class TwoHeads(nn.Module):
    """Two outputs from one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 4), conv(4, 4)
        self.left, self.right = conv(4, 1), conv(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.b(F.relu(self.a(x))))
        return self.left(x), self.right(x)


NETS: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain,
    "residual": Residual,
    "vit": ViT,
    "hourglass": Hourglass,
    "two heads": TwoHeads,
}
