"""How far a quantized network is from the float one, on images that nothing was fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan, sqrt

import torch
from torch import Tensor, nn

from slimdown.errors import BadInput
from slimdown.prune.probe import floating_outputs


class Judge:
    """Compares networks with a reference by what they give for some images, (N, C, H, W) each."""

    def __init__(self, reference: nn.Module, images: Sequence[Tensor]) -> None:
        self.images = images
        self.expected = [_outputs(reference, batch) for batch in images]
        self.spreads = _spreads(self.expected)

    def error(self, network: nn.Module) -> float:
        """Root of the squared error over the variance that each output has over the images.

        The mean over the outputs; one that is the same for all images is left out. NaN or infinity
        in an output is an infinite error. Raises BadInput where no output depends on the image.
        """
        squares = [0.0] * len(self.spreads)
        for batch, expected in zip(self.images, self.expected, strict=True):
            results = _outputs(network, batch)
            for index, (ours, theirs) in enumerate(zip(results, expected, strict=True)):
                squares[index] += float((ours - theirs).square().sum())
        shares = [
            square / spread
            for square, spread in zip(squares, self.spreads, strict=True)
            if spread > 0
        ]
        if not shares:
            raise BadInput(self._why_nothing_differs())
        mean = sum(shares) / len(shares)
        return float("inf") if isnan(mean) else sqrt(mean)

    def _why_nothing_differs(self) -> str:
        if sum(len(batch) for batch in self.images) == 1:
            return (
                "one calibration image tells nothing of how outputs differ: give a few dozen, or "
                "take quantize.effort: fast, which compares nothing"
            )
        if not all(bool(x.isfinite().all()) for outputs in self.expected for x in outputs):
            return (
                "the network gives NaN or infinity for calibration images, before any "
                "quantization: look at the images and at its last layers"
            )
        return (
            "the network gives the same for all calibration images, so nothing can be told of its "
            "quantization: look at the images and at the weights, or take quantize.effort: fast, "
            "which compares nothing"
        )


def _outputs(network: nn.Module, batch: Tensor) -> list[Tensor]:
    """The floating-point outputs for a batch, in float64, (N, values) each."""
    with torch.no_grad():
        tensors = floating_outputs(network(batch.clone()))
    return [x.double().reshape(len(batch), -1) for x in tensors if x.numel() % len(batch) == 0]


def _spreads(outputs: Sequence[Sequence[Tensor]]) -> list[float]:
    """Of each output the squared distances from its mean over all images, added up."""
    together = [torch.cat(parts) for parts in zip(*outputs, strict=True)]
    return [float((each - each.mean(0)).square().sum()) for each in together]
