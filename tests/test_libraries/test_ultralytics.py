from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimdown.capture import analyze, capture, has_dynamic_batch, traceable
from slimdown.load import ModelSource, load_model

pytestmark = pytest.mark.ultralytics
pytest.importorskip("ultralytics", reason="needs the ultralytics extra")


def make(name: str) -> nn.Module:
    model = load_model(ModelSource(f"ultralytics:{name}", options={"nc": 3}))
    with torch.no_grad():  # fresh norms take every layer to a fraction of the signal
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(3)
    return model


def tensors(outputs: Any) -> list[Tensor]:
    """Boxes and scores of a model, in eval mode after the decoded ones."""
    decoded, raw = outputs if isinstance(outputs, tuple) else (None, outputs)
    heads = list(raw.values()) if isinstance(next(iter(raw.values())), dict) else [raw]
    found = [head[key] for head in heads for key in ("boxes", "scores")]
    return found if decoded is None else [decoded, *found]


@pytest.mark.parametrize(
    "name",
    [
        "yolov8n.yaml",
        pytest.param("yolo11n.yaml", marks=pytest.mark.slow),
        pytest.param("yolo26n.yaml", marks=pytest.mark.slow),
    ],
)
def test_yolo_is_pruned_as_a_whole(name, prune, masked, differ):
    model = make(name)
    before = copy.deepcopy(model.state_dict())
    result = prune(model, 64, macs=0.5)
    assert type(result.model) is type(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    old, new = result.facts["macs"]
    assert new <= 0.5 * old

    pruned = copy.deepcopy(result.model).double().eval()
    x = torch.randn(2, 3, 64, 64).double()
    with torch.no_grad():
        ours, theirs = tensors(pruned(x)), tensors(masked(model, result)(x))
    assert all(differ(a, b) < 1e-6 for a, b in zip(ours, theirs, strict=True))

    raw = result.model.train()(torch.randn(2, 3, 64, 64))
    assert all(output.requires_grad for output in tensors(raw))


def test_the_features_between_neck_and_head_can_be_pruned():
    model = make("yolov8n.yaml")
    with torch.no_grad():
        model(torch.randn(1, 3, 96, 96))
    anchors = model.model[-1].anchors
    graph = capture(model, torch.zeros(1, 3, 64, 64))
    assert model.model[-1].anchors is anchors  # which the head keeps from its last forward
    assert traceable(model).model is model.model
    assert has_dynamic_batch(graph)
    assert graph.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        decoded, raw = graph(x)
        torch.testing.assert_close(decoded, model(x)[0])
    assert raw.keys() == {"boxes", "scores"}
    assert analyze(graph).frozen_shares()["output"] < 0.05
