from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimdown.capture import capture
from slimdown.quantize.fold import Norm, fold_batch_norms, fold_norm


def count_norms(graph_module: torch.fx.GraphModule) -> int:
    return sum("batch_norm" in str(node.target) for node in graph_module.graph.nodes)


def worn(norm: nn.Module) -> nn.Module:
    """A norm with the state of one that has been trained."""
    for name, tensor in norm.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + (0.1 if name == "running_var" else -0.5))
    return norm


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_affine", [True, False])
def test_folded_layer_computes_layer_and_norm_in_float64(has_bias: bool, is_affine: bool) -> None:
    conv = nn.Conv2d(4, 6, 3, groups=2, bias=has_bias).double()
    norm = worn(nn.BatchNorm2d(6, affine=is_affine).double()).eval()
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    state = Norm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
    weight, bias = fold_norm(conv.weight, conv.bias, state)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(
        F.conv2d(x, weight, bias, groups=2), norm(conv(x)), rtol=1e-12, atol=1e-12
    )


def test_folding_in_float32_loses_no_more_than_float32_does() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), worn(nn.BatchNorm2d(8)), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(4, 3, 9, 9)
    folded = fold_batch_norms(capture(model, x[:1]))
    exact = model.double()(x.double())
    assert count_norms(folded) == 0
    assert (folded(x) - exact).abs().max() < 1e-5 * exact.abs().max()


def test_keeps_names_and_leaves_its_input_as_it_was(tiny_net: nn.Module) -> None:
    x = torch.randn(2, 3, 16, 16)
    captured = capture(tiny_net, x[:1])
    before = {name: tensor.clone() for name, tensor in captured.state_dict().items()}
    folded = fold_batch_norms(captured)
    assert count_norms(captured) == 1
    assert all(torch.equal(before[name], t) for name, t in captured.state_dict().items())
    assert {"stem.weight", "stem.bias"} <= folded.state_dict().keys()
    assert not any(name.startswith("bn.") for name in folded.state_dict())
    torch.testing.assert_close(folded(x), tiny_net(x))


def test_folds_a_linear_of_vectors_and_not_of_sequences() -> None:
    flat = nn.Sequential(nn.Linear(5, 6), worn(nn.BatchNorm1d(6))).eval()
    sequence = nn.Sequential(nn.Linear(5, 6), worn(nn.BatchNorm1d(7))).eval()  # norm over L = 7
    for model, shape, left in ((flat, (1, 5), 0), (sequence, (1, 7, 5), 1)):
        x = torch.randn(shape)
        folded = fold_batch_norms(capture(model, x))
        assert count_norms(folded) == left
        torch.testing.assert_close(folded(x), model(x))


class TwoReaders(nn.Module):
    """The convolution's result is read beside the norm, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), worn(nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.bn(x) + x


class SharedWeight(nn.Module):
    """One convolution, two norms, as in detection heads that are shared over scales."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn1, self.bn2 = worn(nn.BatchNorm2d(3)), worn(nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv(self.bn1(self.conv(x))))


class NormFirst(nn.Module):
    """Nothing before the norm to fold it into."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = worn(nn.BatchNorm2d(3)), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.bn(x).relu())


class BiasElsewhere(nn.Module):
    """Beside the weight lies a bias that belongs to something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3, 1, 1)), nn.Parameter(torch.ones(3))
        self.bn = worn(nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.conv2d(x + self.bias.view(3, 1, 1), self.weight))


@pytest.mark.parametrize(
    ("model", "left"),
    [(TwoReaders(), 1), (SharedWeight(), 0), (NormFirst(), 1), (BiasElsewhere(), 0)],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_folds_only_what_it_may(model: nn.Module, left: int) -> None:
    x = torch.randn(2, 3, 5, 5)
    folded = fold_batch_norms(capture(model.eval(), x[:1]))
    assert count_norms(folded) == left
    torch.testing.assert_close(folded(x), model(x))
