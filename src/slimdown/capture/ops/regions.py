"""Cutting regions out of feature maps, as detectors of two stages do."""

from __future__ import annotations

from slimdown.capture.call import BATCH, SPATIAL, Call, Shape
from slimdown.capture.dims import Var, freeze_


def roi_align(call: Call) -> Shape:
    """Features (N, C, H, W) and boxes (R, 5) to (R, C, h, w): the channels pass."""
    x, boxes = call.shape("input"), call.shape("rois")
    for dim in (*x[2:], *boxes):
        freeze_(dim, SPATIAL)
    num_boxes, _, height, width = call.output_sizes()
    return (Var(num_boxes, BATCH), x[1], Var(height, SPATIAL), Var(width, SPATIAL))
