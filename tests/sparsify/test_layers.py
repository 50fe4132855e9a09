"""A layer's matrix times its columns is what the layer computes: torch is the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimdown.capture import capture
from slimdown.sparsify import find_weights

NAMES = [
    "linear",
    "tokens",
    "conv",
    "uneven",
    "same",
    "valid",
    "grouped",
    "depthwise",
    "conv1d",
    "conv1d same",
    "conv3d",
    "transposed",
    "grouped transposed",
]


@pytest.mark.parametrize("name", NAMES)
def test_matrix_times_columns_is_the_layer(layers: dict[str, Any], name: str) -> None:
    layer, shape = layers[name]
    x = torch.randn(3, *shape)
    (weight,), refused = find_weights(capture(layer, x[:1]))
    assert not refused
    matrix = weight.to_matrix(layer.weight.detach())
    assert torch.equal(weight.from_matrix(matrix), layer.weight)
    layer.bias = None
    expected = layer(x)
    channels = -1 if isinstance(layer, nn.Linear) else 1
    expected = expected.movedim(channels, 0).flatten(1)
    result = (matrix @ weight.columns(x)).flatten(0, 1)
    torch.testing.assert_close(result, expected)


def test_neighbors_in_a_row_are_input_channels_at_one_kernel_position() -> None:
    conv = nn.Conv2d(4, 1, 2)
    with torch.no_grad():
        conv.weight.copy_(torch.arange(16).view(1, 4, 2, 2))
    (weight,), _ = find_weights(capture(conv, torch.randn(1, 4, 5, 5)))
    assert weight.to_matrix(conv.weight.detach())[0, 0, :4].tolist() == [0, 4, 8, 12]


class Odd(nn.Module):
    """A shared weight and a computed one."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(self.b(self.a(x)))


def test_a_shared_weight_is_found_once_and_others_are_named_with_the_reason() -> None:
    found, refused = find_weights(capture(Odd(), torch.randn(1, 8)))
    assert len(found) == 1
    assert found[0].layer in ("a", "b")
    assert "computed" in refused["normed"]
