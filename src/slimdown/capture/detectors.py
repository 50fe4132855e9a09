"""Detectors as networks of tensors: what of them can be captured, and what torch.export cannot see.

A detector takes lists of images and gives lists of boxes, and how many there are depends on the
images. What is worth pruning lies before: backbone, neck and heads. So a detector is captured, and
compared, as a view of itself: the same modules under the same names, with another `forward`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

NUM_BOXES, NUM_DETECTIONS = 100, 10
"""How many boxes of an image the second stage of a view looks at, and to how many of them it gives
a mask and keypoints. torchvision's own default is ten times as many, which would make a check of
a pruned Keypoint R-CNN take minutes; so a view's second stage counts for a tenth of its MACs."""


def traceable(model: nn.Module) -> nn.Module:
    """What of a model is captured, (N, C, H, W) to tensors: of a detector a view, else itself.

    A view shares all modules and tensors with the detector, under the same names.
    """
    if isinstance(model, _View):
        return model
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(model).__mro__)
    forward = next((FORWARDS[name] for name in names if name in FORWARDS), None)
    if forward is None:
        return model
    kind = type(model)
    return _as_kind(model, type(kind.__name__, (_View, kind), {"forward": forward, "_whole": kind}))


def whole(module: nn.Module) -> nn.Module:
    """Undo `traceable`: the detector that a view is of; any other module is itself."""
    return _as_kind(module, module._whole) if isinstance(module, _View) else module


class _View(nn.Module):
    """Marks a view, and knows the class of the detector."""

    _whole: ClassVar[type[nn.Module]]


def _as_kind(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """The same state under another class."""
    twin = copy.copy(module)
    twin.__class__ = kind
    return twin


# -------------------------------------------------------------------------------- torchvision's


def _run_one_stage(detector: Any, images: Tensor) -> Any:
    """Scores and offsets of all anchors, (N, anchors, …)."""
    return detector.head(list(_features(detector, images).values()))


def _run_two_stage(detector: Any, images: Tensor) -> list[Tensor]:
    """Those of all anchors, and what the heads of the second stage say of fixed boxes."""
    features = _features(detector, images)
    scores, offsets = detector.rpn.head(list(features.values()))
    heads = detector.roi_heads
    regions = _pool(heads.box_roi_pool, features, NUM_BOXES)
    found = list(heads.box_predictor(heads.box_head(regions)))
    if heads.has_mask():
        regions = _pool(heads.mask_roi_pool, features, NUM_DETECTIONS)
        found.append(heads.mask_predictor(heads.mask_head(regions)))
    if heads.has_keypoint():
        regions = _pool(heads.keypoint_roi_pool, features, NUM_DETECTIONS)
        found.append(heads.keypoint_predictor(heads.keypoint_head(regions)))
    return [*scores, *offsets, *(each.unflatten(0, (images.shape[0], -1)) for each in found)]


def _features(detector: Any, images: Tensor) -> Mapping[str, Tensor]:
    features = detector.backbone(images)
    return {"0": features} if isinstance(features, Tensor) else features


def _pool(pool: Any, features: Mapping[str, Tensor], num_boxes: int) -> Tensor:
    """Features of fixed boxes, (N * boxes, C, h, w), as `MultiScaleRoIAlign` cuts them out.

    Which level a box belongs to depends on its size; here every level gets equally many.
    """
    from torchvision.ops import roi_align

    levels = [features[name] for name in pool.featmap_names if name in features]
    regions = []
    for level in levels:
        boxes = _fixed_boxes(level, max(num_boxes // len(levels), 1))
        region = roi_align(level, boxes, pool.output_size, sampling_ratio=pool.sampling_ratio)
        regions.append(region.unflatten(0, (level.shape[0], -1)))
    return torch.cat(regions, 1).flatten(0, 1)


def _fixed_boxes(level: Tensor, num_boxes: int) -> Tensor:
    """Boxes of a quarter of the area along a diagonal: (N * boxes, 5), the image's number first."""
    num_images, _, height, width = level.shape
    size = (num_images, num_boxes)
    left = torch.linspace(0, 0.5, num_boxes, dtype=level.dtype, device=level.device)
    top = 0.5 - left
    image = torch.arange(num_images, dtype=level.dtype, device=level.device)
    corners = (left * width, top * height, (left + 0.5) * width, (top + 0.5) * height)
    columns = (image[:, None].expand(size), *(corner.expand(size) for corner in corners))
    return torch.stack(columns, 2).flatten(0, 1)


# -------------------------------------------------------------------------------- ultralytics'


def _run_ultralytics(model: Any, images: Tensor) -> Any:
    """What the model gives, but for the features that it hands on for the sake of their sizes."""
    return _without_features(super(_View, model).forward(images))


def _without_features(outputs: Any) -> Any:
    if isinstance(outputs, Mapping):
        return {k: _without_features(v) for k, v in outputs.items() if k != "feats"}
    if isinstance(outputs, list | tuple):
        return [_without_features(each) for each in outputs]
    return outputs


FORWARDS: dict[str, Callable[[Any, Tensor], Any]] = {
    "torchvision.models.detection.fcos.FCOS": _run_one_stage,
    "torchvision.models.detection.generalized_rcnn.GeneralizedRCNN": _run_two_stage,
    "torchvision.models.detection.retinanet.RetinaNet": _run_one_stage,
    "torchvision.models.detection.ssd.SSD": _run_one_stage,
    "ultralytics.nn.tasks.DetectionModel": _run_ultralytics,
}
"""The forward of the view of each class of detectors, subclasses included.

By name, so that nothing is imported to find out that a model is none of them.
"""
