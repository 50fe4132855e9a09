"""Captured graphs change their mode as the modules that they were taken from."""

from __future__ import annotations

import copy

import torch
from torch import nn

from slimdown.capture import capture
from slimdown.distill.mode import set_mode_

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def _net(*, tracks: bool = True) -> nn.Sequential:
    norm = nn.BatchNorm2d(4, track_running_stats=tracks)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Dropout(0.4), nn.Dropout2d(0.4)).eval()


def test_a_graph_follows_its_module() -> None:
    net = _net()
    graph = copy.deepcopy(capture(net, IMAGES[:1]))
    for training in (True, False, True):
        net.train(training)
        set_mode_(graph, training=training)
        outputs = []
        for model in (net, graph):
            torch.manual_seed(4)
            outputs.append(model(IMAGES))
        torch.testing.assert_close(outputs[0], outputs[1])
        torch.testing.assert_close(net[1].running_var, graph.get_buffer("1.running_var"))
        assert graph.training is training


def test_graphs_inside_of_modules_are_found() -> None:
    inner = copy.deepcopy(capture(_net(), IMAGES[:1]))
    outer = nn.Sequential(inner, nn.Flatten())
    before = inner.get_buffer("1.running_mean").clone()
    set_mode_(outer, training=True)
    outer(IMAGES)
    assert not torch.equal(inner.get_buffer("1.running_mean"), before)


def test_norms_without_running_statistics_stay_as_they_are() -> None:
    graph = copy.deepcopy(capture(_net(tracks=False)[:2], IMAGES[:1]))
    expected = graph(IMAGES)
    for training in (True, False):
        set_mode_(graph, training=training)
        torch.testing.assert_close(graph(IMAGES), expected)
