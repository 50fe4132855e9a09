from __future__ import annotations

import pytest
import torch
from torch import nn

from slimdown.load.onnx.names import is_made_up, layer_path, place_


@pytest.mark.parametrize(
    ("node", "weight", "scope", "path"),
    [
        ("node_Conv_12", "layer1.0.conv1.weight", "layer1.0.bn1", "layer1.0.conv1"),
        ("node_linear", "fc_weight", "fc", "fc_weight"),
        ("node_MatMul_3", "val_3", "blocks.0.mlp.fc1", "blocks.0.mlp.fc1"),
        ("/layer1/layer1.0/conv1/Conv", "onnx::Conv_193", "", "layer1.0.conv1"),
        ("/features/features.1/block/block.0/block.0.0/Conv", "", "", "features.1.block.0.0"),
        ("/fc/MatMul", "onnx::MatMul_9", "", "fc"),
        ("Conv_0", "12", "", "Conv_0"),
        ("", "12", "", "conv"),
        ("net/conv1/Conv2D", "net/conv1/kernel:0", "", "net.conv1.kernel"),
    ],
)
def test_a_layer_is_called_as_before_the_export(
    node: str, weight: str, scope: str, path: str
) -> None:
    assert layer_path("Conv", node, weight, scope=scope) == path


@pytest.mark.parametrize("name", ["", "12", "val_3", "onnx::Add_4", "/a/Constant_output_0"])
def test_counted_names_are_no_names(name: str) -> None:
    assert is_made_up(name)


@pytest.mark.parametrize("name", ["pos_embed", "blocks.0.gamma_1", "w", "conv1.weight"])
def test_names_of_the_users(name: str) -> None:
    assert not is_made_up(name)


def test_places_do_not_collide() -> None:
    root = nn.Module()
    assert place_(root, "a.conv", nn.Conv2d(1, 1, 1)) == "a.conv"
    assert place_(root, "a.conv", nn.Conv2d(1, 1, 1)) == "a.conv_2"
    assert place_(root, "a.conv.weight", nn.Parameter(torch.ones(1))) == "a.conv.weight_2"
    assert place_(root, "train.forward", torch.ones(1)) == "train_.forward_"
    assert place_(root, "train.state", torch.ones(1)) == "train_.state"
    assert dict(root.named_buffers()).keys() == {"train_.forward_", "train_.state"}
