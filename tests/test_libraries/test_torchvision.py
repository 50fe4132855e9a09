from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.ssd import SSD
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from slimdown.capture import analyze, capture, has_dynamic_batch, traceable, whole

IMAGES = [torch.rand(3, 64, 64), torch.rand(3, 48, 60)]
TARGETS = [
    {
        "boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
        "keypoints": torch.tensor([[[8.0, 8.0, 1.0]] * 3]),
    }
]


class Body(nn.Module):
    """Two levels of features, with the frozen norms of torchvision's detectors."""

    def __init__(self, norm: type[nn.Module] = FrozenBatchNorm2d) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), norm(16), nn.ReLU())
        self.a = nn.Sequential(nn.Conv2d(16, 24, 3, 2, 1), norm(24), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(24, 32, 3, 2, 1), norm(32), nn.ReLU())
        self.out_channels = [24, 32]

    def forward(self, x):
        a = self.a(self.stem(x))
        return {"0": a, "1": self.b(a)}


class LastLevel(Body):
    def __init__(self) -> None:
        super().__init__()
        self.out_channels = 32

    def forward(self, x):
        return super().forward(x)["1"]


def pyramid() -> nn.Module:
    """(N, 3, H, W) -> levels of 32 channels; the body is kept as a whole."""
    backbone = BackboneWithFPN(nn.Sequential(), {}, [24, 32], 32)
    backbone.body = Body()
    return backbone


def anchors(num_levels: int) -> AnchorGenerator:
    return AnchorGenerator(sizes=((16,),) * num_levels, aspect_ratios=((1.0,),) * num_levels)


SIZES = {"min_size": 64, "max_size": 64}


def first() -> dict[str, Any]:
    """A small first stage and box head."""
    box_head = TwoMLPHead(32 * 49, 40)
    return {"rpn_anchor_generator": anchors(3), "box_head": box_head, **SIZES}


MAKERS = {
    "retinanet": lambda: RetinaNet(pyramid(), 5, anchor_generator=anchors(3), **SIZES),
    "fcos": lambda: FCOS(pyramid(), 5, anchor_generator=anchors(3), **SIZES),
    "ssd": lambda: SSD(Body(nn.BatchNorm2d), DefaultBoxGenerator([[2]] * 2), (64, 64), 5),
    "faster rcnn": lambda: FasterRCNN(pyramid(), box_predictor=FastRCNNPredictor(40, 5), **first()),
    "mask rcnn": lambda: MaskRCNN(
        pyramid(),
        box_predictor=FastRCNNPredictor(40, 5),
        mask_head=MaskRCNNHeads(32, (24, 24), 1),
        mask_predictor=MaskRCNNPredictor(24, 24, 5),
        **first(),
    ),
    "keypoint rcnn": lambda: KeypointRCNN(
        pyramid(),
        box_predictor=FastRCNNPredictor(40, 2),
        keypoint_head=KeypointRCNNHeads(32, (24, 24)),
        keypoint_predictor=KeypointRCNNPredictor(24, 3),
        **first(),
    ),
    "one level": lambda: FasterRCNN(
        LastLevel(),
        5,
        rpn_anchor_generator=anchors(1),
        box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2),
        **SIZES,
    ),
}


def make(name: str) -> nn.Module:
    model = MAKERS[name]()
    with torch.no_grad():
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith(("running_var", "running_mean")):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model.eval()


@pytest.mark.parametrize("name", MAKERS)
def test_a_detector_is_captured_as_a_view_of_itself(name):
    model = make(name)
    view = traceable(model)
    assert traceable(view) is view
    assert type(whole(view)) is type(model)
    assert all(
        a is b for a, b in zip(view.modules(), model.modules(), strict=True) if a is not view
    )
    graph = capture(model, torch.zeros(1, 3, 64, 64))
    assert has_dynamic_batch(graph)
    assert graph.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(flat(graph(x)), flat(view(x)), strict=True):
            assert len(ours) == 2
            torch.testing.assert_close(ours, theirs)
    unknown = analyze(graph).frozen_shares().keys() - {"input", "output"}
    assert not {reason for reason in unknown if "roi_align" in reason}


def flat(outputs):
    return list(outputs.values()) if isinstance(outputs, dict) else outputs


@pytest.mark.parametrize("name", ["fcos", "ssd", "faster rcnn", "mask rcnn", "one level"])
def test_a_pruned_detector_is_the_users_own(name, prune, masked):
    model = make(name)
    result = prune(model, 64, macs=0.5)
    pruned = result.model
    assert type(pruned) is type(model)
    before, after = result.facts["macs"]
    assert after <= before / 2
    assert len(pruned.state_dict()) == len(model.state_dict())

    # The masked original finds the same boxes, by torchvision's own forward.
    pruned = copy.deepcopy(pruned).double().eval()
    with torch.no_grad():
        images = [image.double() for image in IMAGES]
        for ours, theirs in zip(pruned(images), masked(model, result)(images), strict=True):
            assert ours.keys() == theirs.keys()
            torch.testing.assert_close(ours["scores"], theirs["scores"])
            torch.testing.assert_close(ours["boxes"], theirs["boxes"])


@pytest.mark.parametrize("name", ["retinanet", "keypoint rcnn"])
def test_a_pruned_detector_is_trained_by_its_own_losses(name, prune):
    model = prune(make(name), 64, macs=0.6).model.train()
    losses = model(IMAGES[:1], TARGETS)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_every_other_model_is_its_own_view(tiny_net):
    assert traceable(tiny_net) is tiny_net
    assert whole(tiny_net) is tiny_net
