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


def test_norms_whose_statistics_cannot_move_stay_as_they_are():
    for norm in (nn.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3, track_running_stats=False)):
        graph = TrainableGraph.adopt(capture(norm.eval(), IMAGES[:1]))
        expected = graph(IMAGES)
        for training in (True, False):
            torch.testing.assert_close(graph.train(training)(IMAGES), expected)


def test_copies_keep_plain_attributes_and_which_buffers_are_not_saved(graph):
    graph.register_buffer("table", torch.ones(2), persistent=False)
    graph.num_heads = 3
    twin = copy.deepcopy(graph)
    assert twin.num_heads == 3
    assert "table" not in twin.state_dict()
    assert twin.state_dict().keys() == graph.state_dict().keys()
