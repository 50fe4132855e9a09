"""What can be removed of each kind of layer: exactly these groups are found, and they are right.

Right means: with any part of any group removed, the pruned graph passes `check_surgery`.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from slimdown.capture import analyze, capture
from slimdown.capture.dims import is_frozen, leaves
from slimdown.prune.probe import make_probe
from slimdown.prune.surgery import prune_graph
from slimdown.prune.verify import check_surgery

IMAGES = (8, 6, 6)
"""(C, H, W) of what a network below is fed with."""


def free_groups(analysis):
    """Size -> members, of every group that can lose channels: "tensor:axis", without ".weight"."""
    found = {}
    for name, shape in analysis.tensors.items():
        for axis, dim in enumerate(shape):
            for leaf in dict.fromkeys(leaves(dim)):
                if not is_frozen(leaf):
                    found.setdefault(leaf, set()).add(f"{name.removesuffix('.weight')}:{axis}")
    return {(leaf.size, frozenset(members)) for leaf, members in found.items()}


def groups(*expected):
    return {(size, frozenset(members.split())) for size, members in expected}


class Net(nn.Module):
    """Layers by name, and a forward that is given with them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.apply_ = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.apply_(self, x)


def tokens(x):
    return x.flatten(2).transpose(1, 2)


def channels():
    return Net(
        lambda m, x: m.b(torch.relu(m.norm(m.a(x)))),
        a=nn.Conv2d(8, 12, 3),
        norm=nn.BatchNorm2d(12),
        b=nn.Conv2d(12, 4, 1),
    ), groups((12, "a:0 a.bias:0 norm:0 norm.bias:0 norm.running_mean:0 norm.running_var:0 b:1"))


def residual_width():
    def forward(m, x):
        x = m.stem(x)
        return m.head(x + m.b(torch.relu(m.a(x))))

    return Net(
        forward,
        stem=nn.Conv2d(8, 12, 1, bias=False),
        a=nn.Conv2d(12, 6, 1, bias=False),
        b=nn.Conv2d(6, 12, 1, bias=False),
        head=nn.Conv2d(12, 4, 1, bias=False),
    ), groups((12, "stem:0 a:1 b:0 head:1"), (6, "a:0 b:1"))


def convolution_groups():
    return Net(
        lambda m, x: m.c(m.b(m.a(x))),
        a=nn.Conv2d(8, 12, 1, bias=False),
        b=nn.Conv2d(12, 20, 3, groups=4, bias=False),
        c=nn.Conv2d(20, 4, 1, bias=False),
    ), groups((4, "a:0 b:0 c:1"), (3, "a:0 b:1"), (5, "b:0 c:1"))


def concatenation():
    return Net(
        lambda m, x: m.c(torch.cat([m.a(x), m.b(x), m.a(x)], 1)),
        a=nn.Conv2d(8, 5, 1, bias=False),
        b=nn.Conv2d(8, 7, 1, bias=False),
        c=nn.Conv2d(17, 4, 1, bias=False),
    ), groups((5, "a:0 c:1"), (7, "b:0 c:1"))


def channel_shuffle():
    def forward(m, x):
        x = m.a(x)
        left, right = x.chunk(2, 1)
        x = torch.cat([left, m.b(right)], 1)
        return m.c(F.channel_shuffle(x, 2))

    return Net(
        forward,
        a=nn.Conv2d(8, 12, 1, bias=False),
        b=nn.Conv2d(6, 6, 1, bias=False),
        c=nn.Conv2d(12, 4, 1, bias=False),
    ), groups((6, "a:0 b:0 c:1"), (6, "a:0 b:1"))


def squeeze_and_excite():
    def forward(m, x):
        x = m.a(x)
        return m.b(x * torch.sigmoid(m.expand(torch.relu(m.squeeze(x.mean((2, 3), True))))))

    return Net(
        forward,
        a=nn.Conv2d(8, 12, 1, bias=False),
        squeeze=nn.Conv2d(12, 3, 1, bias=False),
        expand=nn.Conv2d(3, 12, 1, bias=False),
        b=nn.Conv2d(12, 4, 1, bias=False),
    ), groups((12, "a:0 squeeze:1 expand:0 b:1"), (3, "squeeze:0 expand:1"))


def fused_qkv():
    """Heads 3, head width 8, embedding width 24, hidden width 32."""

    def forward(m, x):
        x = m.embed(tokens(x))
        n, length, _ = x.shape
        q, k, v = m.qkv(x).reshape(n, length, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + m.proj(y.transpose(1, 2).flatten(2))
        return m.head(x + m.fc2(F.gelu(m.fc1(x))))

    return Net(
        forward,
        embed=nn.Linear(8, 24, bias=False),
        qkv=nn.Linear(24, 72, bias=False),
        proj=nn.Linear(24, 24, bias=False),
        fc1=nn.Linear(24, 32, bias=False),
        fc2=nn.Linear(32, 24, bias=False),
        head=nn.Linear(24, 4, bias=False),
    ), groups(
        (24, "embed:0 qkv:1 proj:0 fc1:1 fc2:0 head:1"),
        (3, "qkv:0 proj:1"),
        (8, "qkv:0 proj:1"),
        (32, "fc1:0 fc2:1"),
    )


def grouped_query_attention(*, repeated=False):
    """2 heads of keys and values, each for 3 heads of queries, width 4; values are 5 wide."""

    def forward(m, x):
        x = tokens(x)
        n, length, _ = x.shape
        q = m.q(x).view(n, length, 6, 4).transpose(1, 2)
        k = m.k(x).view(n, length, 2, 4).transpose(1, 2)
        v = m.v(x).view(n, length, 2, 5).transpose(1, 2)
        if repeated:
            k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=not repeated)
        return m.proj(y.transpose(1, 2).flatten(2))

    return Net(
        forward,
        q=nn.Linear(8, 24, bias=False),
        k=nn.Linear(8, 8, bias=False),
        v=nn.Linear(8, 10, bias=False),
        proj=nn.Linear(30, 4, bias=False),
    ), groups((2, "q:0 k:0 v:0 proj:1"), (3, "q:0 proj:1"), (4, "q:0 k:0"), (5, "v:0 proj:1"))


def gated_mlp():
    """SwiGLU, as two layers and as one that is split."""

    def forward(m, x):
        x = torch.cat([F.silu(m.gate(tokens(x))) * m.up(tokens(x)), tokens(x)], -1)
        a, b = m.both(m.down(x)).chunk(2, -1)
        return m.last(F.silu(a) * b)

    return Net(
        forward,
        gate=nn.Linear(8, 10, bias=False),
        up=nn.Linear(8, 10, bias=False),
        down=nn.Linear(18, 12, bias=False),
        both=nn.Linear(12, 28, bias=False),
        last=nn.Linear(14, 4, bias=False),
    ), groups((10, "gate:0 up:0 down:1"), (12, "down:0 both:1"), (14, "both:0 last:1"))


def glu():
    return Net(
        lambda m, x: m.b(F.glu(m.a(x), 1)),
        a=nn.Conv2d(8, 12, 1, bias=False),
        b=nn.Conv2d(6, 4, 1, bias=False),
    ), groups((6, "a:0 b:1"))


def position_biases():
    """A table (positions, heads), as in Swin: heads go, positions stay."""

    def forward(m, x):
        x = tokens(x)
        n, length, _ = x.shape
        q, k, v = m.qkv(x).view(n, length, 3, 4, 5).permute(2, 0, 3, 1, 4).unbind(0)
        bias = m.table[m.index.view(-1)].view(length, length, 4).permute(2, 0, 1)
        scores = (q * 0.4) @ k.transpose(-2, -1) + bias.unsqueeze(0)
        return m.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, 20))

    return Net(
        forward,
        qkv=nn.Linear(8, 60, bias=False),
        table=nn.Parameter(torch.randn(9, 4)),
        index=nn.Parameter(torch.arange(36 * 36).view(36, 36) % 9, requires_grad=False),
        proj=nn.Linear(20, 4, bias=False),
    ), groups((4, "qkv:0 table:1 proj:1"), (5, "qkv:0 proj:1"))


def rotary_pairs():
    """Interleaved rotary positions turn pairs of channels, so that pairs go."""

    def turned(m, x):
        other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
        return x * m.cos + other * m.sin

    def forward(m, x):
        x = tokens(x)
        q, k = (layer(x).unflatten(-1, (2, 6)).transpose(1, 2) for layer in (m.q, m.k))
        scores = turned(m, q) @ turned(m, k).transpose(-2, -1)
        return m.proj(scores.softmax(-1).mean(1) @ x)

    return Net(
        forward,
        q=nn.Linear(8, 12, bias=False),
        k=nn.Linear(8, 12, bias=False),
        cos=nn.Parameter(torch.randn(36, 6)),
        sin=nn.Parameter(torch.randn(36, 6)),
        proj=nn.Linear(8, 4, bias=False),
    ), groups((2, "q:0 k:0"), (3, "q:0 k:0 cos:1 sin:1"))


def standardized_weights():
    def forward(m, x):
        w = m.a.weight
        w = F.batch_norm(w.reshape(1, 12, -1), None, None, training=True).reshape_as(w)
        return m.b(F.conv2d(m.stem(x), w))

    return Net(
        forward,
        stem=nn.Conv2d(8, 6, 1, bias=False),
        a=nn.Conv2d(6, 12, 3, bias=False),
        b=nn.Conv2d(12, 4, 1, bias=False),
    ), groups((6, "stem:0 a:1"), (12, "a:0 b:1"))


def response_norm():
    """ConvNeXt v2's: each channel over the mean of all."""

    def forward(m, x):
        x = m.a(x)
        norm = x.norm(dim=(2, 3), keepdim=True)
        return m.b(x * (norm / norm.mean(1, keepdim=True)))

    return Net(
        forward, a=nn.Conv2d(8, 12, 1, bias=False), b=nn.Conv2d(12, 4, 1, bias=False)
    ), groups((12, "a:0 b:1"))


def lstm():
    """Bidirectional, over rows of pixels."""

    def forward(m, x):
        rows, _ = m.lstm(m.a(x).mean(2).transpose(1, 2))
        return m.b(rows)

    weights = "weight_ih_l0:0 weight_hh_l0:0 weight_hh_l0:1"
    both = [f"lstm.{w.replace('l0', end)}" for end in ("l0", "l0_reverse") for w in weights.split()]
    return Net(
        forward,
        a=nn.Conv2d(8, 6, 1, bias=False),
        lstm=nn.LSTM(6, 5, bidirectional=True, batch_first=True, bias=False),
        b=nn.Linear(10, 4, bias=False),
    ), groups(
        (6, "a:0 lstm.weight_ih_l0:1 lstm.weight_ih_l0_reverse:1"),
        (5, " ".join([*both, "b:1"])),
    )


def windows_and_pixels():
    """unfold, fold and both pixel shuffles."""

    def forward(m, x):
        x = F.pixel_unshuffle(m.a(x), 2)
        x = F.pixel_shuffle(m.b(x), 2)
        return m.c(F.unfold(x, 3).transpose(1, 2))

    return Net(
        forward,
        a=nn.Conv2d(8, 3, 1, bias=False),
        b=nn.Conv2d(12, 20, 1, bias=False),
        c=nn.Linear(45, 4, bias=False),
    ), groups((3, "a:0 b:1"), (5, "b:0 c:1"))


def einsum_attention():
    def forward(m, x):
        q, k, v = (layer(tokens(x)).unflatten(-1, (3, 4)) for layer in (m.q, m.k, m.v))
        scores = torch.einsum("blhd,bshd->bhls", q, k).softmax(-1)
        return m.proj(torch.einsum("bhls,bshd->blhd", scores, v).flatten(2))

    return Net(
        forward,
        **{name: nn.Linear(8, 12, bias=False) for name in "qkv"},
        proj=nn.Linear(12, 4, bias=False),
    ), groups((3, "q:0 k:0 v:0 proj:1"), (4, "q:0 k:0"), (4, "v:0 proj:1"))


def heads_in_the_batch():
    """Attention on (N · heads, L, width), as torch.nn.MultiheadAttention does it."""

    def forward(m, x):
        x = tokens(x)
        n, length, _ = x.shape

        def fold(y):
            return y.view(n, length, 3, 4).transpose(1, 2).reshape(n * 3, length, 4)

        q, k, v = fold(m.q(x)), fold(m.k(x)), fold(m.v(x))
        y = torch.bmm((0.5 * torch.bmm(q, k.transpose(1, 2))).softmax(-1), v)
        return m.proj(y.view(n, 3, length, 4).transpose(1, 2).reshape(n, length, 12))

    return Net(
        forward,
        **{name: nn.Linear(8, 12, bias=False) for name in "qkv"},
        proj=nn.Linear(12, 4, bias=False),
    ), groups((3, "q:0 k:0 v:0 proj:1"), (4, "q:0 k:0"), (4, "v:0 proj:1"))


def regions():
    """A part without autocast, as attention is often computed."""

    def forward(m, x):
        x = m.a(x)
        with torch.autocast(x.device.type, enabled=False):
            x = torch.relu(x.float())
        return m.b(x)

    return Net(
        forward, a=nn.Conv2d(8, 12, 1, bias=False), b=nn.Conv2d(12, 4, 1, bias=False)
    ), groups((12, "a:0 b:1"))


def products_with_parameters():
    """Weights that no layer holds."""

    def forward(m, x):
        x = tokens(x) @ m.a
        return torch.einsum("blhd,hdk->blk", torch.einsum("blc,chd->blhd", x, m.b), m.c)

    return Net(
        forward,
        a=nn.Parameter(torch.randn(8, 6)),
        b=nn.Parameter(torch.randn(6, 3, 5)),
        c=nn.Parameter(torch.randn(3, 5, 4)),
    ), groups((6, "a:1 b:0"), (3, "b:1 c:0"), (5, "b:2 c:1"))


def lookups():
    """Class tokens by `expand`, positions by an embedding, and a learned token put in front."""

    def forward(m, x):
        x = m.a(tokens(x))
        x = torch.cat([m.cls.expand(len(x), -1, -1), x], 1)
        x = x + m.positions(torch.arange(37))
        return m.b(x.index_select(1, m.some))

    return Net(
        forward,
        a=nn.Linear(8, 12, bias=False),
        cls=nn.Parameter(torch.randn(1, 1, 12)),
        positions=nn.Embedding(37, 12),
        some=nn.Parameter(torch.tensor([0, 5, 7]), requires_grad=False),
        b=nn.Linear(12, 4, bias=False),
    ), groups((12, "a:0 cls:2 positions:1 b:1"))


def weight_norms():
    """Of each output channel, and of a whole weight."""
    norm = nn.utils.parametrizations.weight_norm
    g, v = "parametrizations.weight.original0", "parametrizations.weight.original1"
    return Net(
        lambda m, x: m.b(torch.relu(m.a(x))),
        a=norm(nn.Conv2d(8, 12, 3)),
        b=norm(nn.Conv2d(12, 4, 1), dim=None),
    ), groups((12, f"a.{g}:0 a.{v}:0 a.bias:0 b.{v}:1"))


def spectral_norms():
    """The first layer's iteration vectors go with its weight."""
    norm, name = nn.utils.parametrizations.spectral_norm, "parametrizations.weight"
    return Net(
        lambda m, x: m.b(torch.relu(m.a(x))),
        a=norm(nn.Conv2d(8, 12, 3)),
        b=nn.Conv2d(12, 4, 1),
    ), groups((12, f"a.{name}.original:0 a.{name}.0._u:0 a.bias:0 b:1"))


def neighbors_apart():
    def forward(m, x):
        around = m.d(x).flatten(2)[:, :, :1]
        return m.b(torch.diff(m.a(x).flatten(2), dim=2, prepend=around).mean(2))

    return Net(forward, a=nn.Conv2d(8, 12, 3), d=nn.Conv2d(8, 12, 3), b=nn.Linear(12, 4)), groups(
        (12, "a:0 a.bias:0 d:0 d.bias:0 b:1")
    )


KINDS = [
    channels,
    residual_width,
    convolution_groups,
    concatenation,
    channel_shuffle,
    squeeze_and_excite,
    fused_qkv,
    grouped_query_attention,
    gated_mlp,
    glu,
    position_biases,
    rotary_pairs,
    standardized_weights,
    response_norm,
    lstm,
    windows_and_pixels,
    einsum_attention,
    heads_in_the_batch,
    regions,
    products_with_parameters,
    lookups,
    weight_norms,
    spectral_norms,
    neighbors_apart,
]


@pytest.fixture
def check(random_choice):
    """Prune a network in three ways; each must compute what the masked network does."""

    def run(model, expected):
        analysis = analyze(capture(model, torch.zeros(1, *IMAGES)))
        assert free_groups(analysis) == expected
        probe = make_probe(analysis)
        for seed in range(3):
            kept = random_choice(analysis, torch.Generator().manual_seed(seed))
            assert check_surgery(analysis, kept, prune_graph(analysis, kept), probe) <= 1e-5

    return run


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_exactly_these_groups_are_found_and_any_part_of_them_can_go(check, kind):
    torch.manual_seed(0)
    check(*kind())


def test_repeated_heads_of_keys_are_grouped_query_attention(check):
    check(*grouped_query_attention(repeated=True))


def test_a_single_channel_that_is_left_is_not_squeezed_out():
    net = Net(
        lambda m, x: m.b(m.a(x).mean((2, 3), keepdim=True).squeeze()),
        a=nn.Conv2d(8, 12, 3),
        b=nn.Linear(12, 4),
    )
    analysis = analyze(capture(net, torch.zeros(1, *IMAGES)))
    (leaf,) = leaves(analysis.tensors["b.weight"][1])
    kept = {leaf: torch.arange(12) == 5}
    pruned = prune_graph(analysis, kept)
    assert check_surgery(analysis, kept, pruned, make_probe(analysis)) <= 1e-5
    assert pruned(torch.zeros(3, *IMAGES)).shape == (3, 4)
