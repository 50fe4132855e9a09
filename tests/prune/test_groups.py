from __future__ import annotations

import time

import pytest
import torch

from slimdown.prune import find_groups


def test_groups_of_a_residual_network(tiny_net):
    groups = {group.name: group for group in find_groups(tiny_net, torch.zeros(1, 3, 16, 16))}
    assert list(groups) == ["input", "stem", "down", "conv1", "head"]
    residual = groups["down"]
    assert set(residual.layers) == {"down", "conv2"}
    assert {("down.weight", 0), ("conv2.weight", 0), ("head.weight", 1)} <= set(residual.members)
    assert residual.size == 16
    assert not residual.frozen
    hidden = groups["conv1"]
    assert hidden.num_parameters == sum(
        p.numel() for p in (*tiny_net.conv1.parameters(), tiny_net.conv2.weight)
    )


def test_frozen_groups_say_why(tiny_net):
    groups = find_groups(tiny_net, torch.zeros(1, 3, 16, 16))
    reasons = {group.reason for group in groups}
    assert reasons == {None, "input", "output"}
    assert next(g for g in groups if g.reason == "output").name == "head"


def test_names_are_distinct(networks):
    for name in ("shuffle", "padded shortcut", "attention", "grouped"):
        groups = find_groups(networks[name](), torch.zeros(1, 8, 8, 8))
        assert len({group.name for group in groups}) == len(groups)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet50", "mobilenet_v3_large", "shufflenet_v2_x0_5", "densenet121", "vit_b_16"]
)
def test_inspecting_is_quick(name):
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.get_model(name, weights=None).eval()
    start = time.process_time()
    groups = find_groups(model, torch.zeros(1, 3, 224, 224))
    assert time.process_time() - start < 10
    assert any(not group.frozen for group in groups)
