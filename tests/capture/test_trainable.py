"""Graphs that follow their mode: what a user who knows nothing of graphs expects of `train()`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from slimdown.capture import capture
from slimdown.capture.trainable import TrainableGraph

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net() -> nn.Sequential:
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.4), nn.Dropout2d(0.4))
    return nn.Sequential(*layers).eval()


@pytest.fixture
def graph(net: nn.Sequential) -> TrainableGraph:
    return TrainableGraph.adopt(capture(net, IMAGES[:1]))


def outputs_of(module: nn.Module) -> torch.Tensor:
    torch.manual_seed(4)
    return module(IMAGES)


def test_train_and_eval_do_what_they_do_to_the_module(net, graph):
    for training in (True, False, True):
        expected = outputs_of(net.train(training))
        torch.testing.assert_close(outputs_of(graph.train(training)), expected)
        torch.testing.assert_close(graph.get_buffer("1.running_var"), net[1].running_var)
        assert graph.training is training
    torch.testing.assert_close(outputs_of(graph.eval()), outputs_of(net.eval()))


def test_copies_follow_their_own_mode(net, graph):
    twin = copy.deepcopy(graph.train())
    assert isinstance(twin, TrainableGraph)
    assert twin.training
    twin.eval()
    torch.testing.assert_close(outputs_of(twin), outputs_of(net.eval()))
    assert graph.training
    assert not torch.equal(outputs_of(graph), outputs_of(twin))


def test_a_graph_inside_of_a_module_follows_its_parent(net, graph):
    parent = nn.Sequential(graph, nn.Flatten()).train()
    before = graph.get_buffer("1.running_mean").clone()
    parent(IMAGES)
    assert not torch.equal(graph.get_buffer("1.running_mean"), before)
    copy.deepcopy(parent).eval()
    assert graph.training


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(24, 5, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x):
        return self.rnn(x.transpose(1, 2).flatten(2))[0]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(0.4, inplace=True),
        nn.Dropout2d(0.4, inplace=True),
        nn.AlphaDropout(0.4, inplace=True),
        nn.FeatureAlphaDropout(0.4),
        nn.RReLU(),
        nn.RReLU(inplace=True),
        nn.BatchNorm2d(4, momentum=0.0),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.InstanceNorm2d(4),
        Recurrent(nn.LSTM),
        Recurrent(nn.GRU),
    ],
    ids=lambda layer: str(layer).replace("\n", ""),
)
def test_whatever_has_a_mode_follows(layer):
    net = layer if isinstance(layer, Recurrent) else nn.Sequential(nn.Conv2d(3, 4, 3), layer)
    graph = capture(net, IMAGES[:1])
    for training in (True, False, True):
        expected = outputs_of(net.train(training))
        torch.testing.assert_close(outputs_of(graph.train(training)), expected)
        for name, buffer in net.named_buffers():
            if "tracked" not in name:
                torch.testing.assert_close(graph.get_buffer(name), buffer)


def test_a_norm_with_a_running_average_normalizes_by_its_batches_but_keeps_its_statistics():
    net = nn.Sequential(nn.BatchNorm2d(3, momentum=None))
    graph = capture(net, IMAGES[:1]).train()
    torch.testing.assert_close(graph(IMAGES), net.train()(IMAGES))
    assert torch.equal(graph.get_buffer("0.running_mean"), torch.zeros(3))


def test_what_libraries_drop_out_in_place_is_dropped_out():
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.mobilenet_v3_small(weights=None, width_mult=0.25).eval()
    graph, x = capture(net, torch.zeros(1, 3, 32, 32)), torch.randn(2, 3, 32, 32)
    torch.manual_seed(4)
    expected = net.train()(x)
    torch.manual_seed(4)
    torch.testing.assert_close(graph.train()(x), expected)


def test_copies_keep_plain_attributes_and_which_buffers_are_not_saved(graph):
    graph.register_buffer("table", torch.ones(2), persistent=False)
    graph.num_heads = 3
    twin = copy.deepcopy(graph)
    assert twin.num_heads == 3
    assert "table" not in twin.state_dict()
    assert twin.state_dict().keys() == graph.state_dict().keys()
