"""A layer as a matrix gives what the layer gives, in torch's own words."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slimdown.capture import capture
from slimdown.prune.compensation.readers import reader_of

LAYERS = {
    "linear": (nn.Linear(6, 4), (5, 6)),
    "convolution": (nn.Conv2d(6, 4, 3, padding=1), (6, 7, 8)),
    "strided": (nn.Conv2d(6, 4, (3, 5), stride=(2, 1), padding=(0, 2)), (6, 9, 8)),
    "dilated": (nn.Conv2d(6, 4, 3, dilation=2, padding=2), (6, 7, 8)),
    "grouped": (nn.Conv2d(6, 4, 3, padding=1, groups=2), (6, 7, 8)),
    "depthwise": (nn.Conv2d(6, 12, 3, padding=1, groups=6), (6, 7, 8)),
    "same": (nn.Conv2d(6, 4, 4, padding="same"), (6, 7, 8)),
    "valid": (nn.Conv2d(6, 4, 3, padding="valid"), (6, 7, 8)),
    "1d": (nn.Conv1d(6, 4, 3, stride=2), (6, 11)),
    "3d": (nn.Conv3d(6, 4, 3, padding=1), (6, 4, 5, 6)),
    "transposed": (nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1), (6, 5, 6)),
    "transposed, more": (
        nn.ConvTranspose2d(6, 4, 2, stride=3, output_padding=1, dilation=2, groups=2),
        (6, 5, 6),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_patches_times_the_matrix_are_the_outputs(name):
    layer, shape = LAYERS[name]
    graph = capture(layer, torch.randn(1, *shape)).graph
    node = next(node for node in graph.nodes if "weight" in map(str, node.all_input_nodes))
    reader = reader_of(node, layer.weight)
    x = torch.randn(2, *shape)
    with torch.no_grad():
        outputs = layer(x)
        positions = torch.randperm(outputs.numel() // 4 // (3 if name == "depthwise" else 1))
        products = reader.patches(x, positions) @ reader.matrix(layer.weight)
        given = reader.ungrouped(products) + layer.bias
    torch.testing.assert_close(given, reader.outputs(outputs, positions), rtol=1e-5, atol=1e-5)
    assert torch.equal(reader.weight(reader.matrix(layer.weight)), layer.weight)
