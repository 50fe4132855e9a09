"""Rules of operators that only some libraries' models have."""

from __future__ import annotations

import torch
import torchvision  # noqa: F401  (registers torchvision::roi_align)

from slimdown.capture.dims import is_frozen, is_same


def test_roi_align_passes_the_channels(apply):
    boxes = torch.tensor([[0.0, 0, 0, 4, 4], [1.0, 1, 1, 5, 5], [1.0, 0, 0, 3, 3]])
    done = apply(
        torch.ops.torchvision.roi_align.default, torch.zeros(2, 6, 8, 8), boxes, 1.0, 2, 2, 2, False
    )
    x, rois = done.inputs
    assert is_same(done.output[1], x[1])
    assert not is_frozen(x[1])
    assert all(is_frozen(dim) for dim in (*x[2:], *rois, done.output[0], *done.output[2:]))


def test_weight_norm_ties_its_scale_and_spares_what_the_norm_runs_over(apply):
    done = apply(torch.ops.aten._weight_norm.default, torch.randn(6, 4, 3), torch.randn(6, 1, 1), 0)
    v, g = done.inputs
    assert is_same(v[0], g[0])
    assert done.output == v
    assert done.call.spared == [v[1], v[2]]
    assert done.call.mixes_channels
