from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from slimdown.images import take_images
from slimdown.quantize import Quantize
from slimdown.quantize.judge import Judge
from slimdown.quantize.stage import split_images

LAYERS = ("stem", "down", "conv1", "conv2", "head")


@pytest.mark.parametrize("profile", ["onnxruntime-x86", "openvino"])
def test_a_layers_error_is_that_of_a_network_with_all_others_excluded(
    tiny_net: nn.Module, toy_task: Any, profile: str
) -> None:
    settings: dict[str, Any] = {"profile": profile, "effort": "fast", "weight_bits": 4}
    errors = Quantize(max_error=10.0, **settings)(tiny_net, toy_task).facts["layer_errors"]
    assert set(LAYERS) < set(errors)
    judge = Judge(tiny_net, split_images(toy_task.batches)[1])
    for layer in LAYERS:
        others = tuple(label for label in errors if label != layer)
        alone = Quantize(exclude=others, **settings)(tiny_net, toy_task)
        assert alone.facts["quantized"] == [layer]
        assert errors[layer] == pytest.approx(judge.error(alone.model), rel=0.05)


def test_is_told_only_where_the_error_is_limited(tiny_net: nn.Module, toy_task: Any) -> None:
    assert Quantize()(tiny_net, toy_task).facts["layer_errors"] == {}


def test_the_first_images_come_in_batches_as_they_were() -> None:
    batches = torch.arange(10.0).view(10, 1).split(4)
    assert [batch.flatten().tolist() for batch in take_images(batches, 6)] == [
        [0, 1, 2, 3],
        [4, 5],
    ]
