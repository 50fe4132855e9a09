"""Augmentation of preprocessed batches, drawn for each image from a generator of its own.

The transforms of `torchvision.transforms.v2` draw once for a whole batch, from the global
generator; these are their counterparts that draw once an image and stay one operation a batch.
"""

from __future__ import annotations

from math import log
from typing import Literal, TypeAlias

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

Augmentation: TypeAlias = Literal["none", "crop", "flip-crop"]

SMALL_IMAGE = 64
"""Up to this size images are cropped pixel by pixel, as resampling would blur them."""


def augment(inputs: Tensor, kind: Augmentation, generator: Generator) -> Tensor:
    """Crop and flip (N, C, H, W) images at random, each in its own way, to the same size."""
    if kind == "none":
        return inputs
    if max(inputs.shape[-2:]) <= SMALL_IMAGE:
        inputs = random_crop(inputs, generator)
    else:
        inputs = random_resized_crop(inputs, generator)
    return random_flip(inputs, generator) if kind == "flip-crop" else inputs


def random_flip(inputs: Tensor, generator: Generator) -> Tensor:
    """Mirror every second image of (N, C, H, W), chosen at random, left to right."""
    chosen = torch.rand(len(inputs), generator=generator) < 0.5
    return torch.where(chosen.to(inputs.device)[:, None, None, None], inputs.flip(-1), inputs)


def random_crop(inputs: Tensor, generator: Generator) -> Tensor:
    """Shift each image of (N, C, H, W) by up to an eighth of its size; borders are reflected."""
    num_images, _, height, width = inputs.shape
    down, right = height // 8, width // 8
    padded = F.pad(inputs, (right, right, down, down), mode="reflect")
    # every possible crop as a view: (N, C, 2 * down + 1, 2 * right + 1, H, W)
    crops = padded.unfold(2, height, 1).unfold(3, width, 1)
    top = torch.randint(2 * down + 1, (num_images,), generator=generator)
    left = torch.randint(2 * right + 1, (num_images,), generator=generator)
    return crops[torch.arange(num_images), :, top, left].contiguous()


def random_resized_crop(
    inputs: Tensor,
    generator: Generator,
    *,
    area: tuple[float, float] = (0.35, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Cut a box of a random area and aspect from each image and stretch it to (H, W).

    `area` is the range of fractions of the image, `ratio` that of width over height.
    Szegedy 2015, arXiv:1409.4842; the crops are milder than for training from nothing.
    """
    num_images = len(inputs)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(num_images, generator=generator)

    aspect, size = draw(log(ratio[0]), log(ratio[1])).exp(), draw(*area)
    width = (size * aspect).sqrt().clamp(max=1.0)
    height = (size / aspect).sqrt().clamp(max=1.0)
    box = torch.zeros(num_images, 2, 3)  # maps output coordinates in [-1, 1] to input ones
    box[:, 0, 0], box[:, 0, 2] = width, (1 - width) * draw(-1.0, 1.0)
    box[:, 1, 1], box[:, 1, 2] = height, (1 - height) * draw(-1.0, 1.0)
    grid = F.affine_grid(box.to(inputs), list(inputs.shape), align_corners=False)
    return F.grid_sample(inputs, grid, padding_mode="reflection", align_corners=False)


def mix_up(inputs: Tensor, share: float) -> Tensor:
    """Blend each image with its neighbor in the batch: share · x + (1 − share) · x of the other.

    Zhang 2018, arXiv:1710.09412. `neighbors` gives the targets of the others.
    """
    return torch.lerp(neighbors(inputs), inputs, share)


def neighbors(values: Tensor) -> Tensor:
    """What `mix_up` blends each item with: (N, ...) moved on by one."""
    return values.roll(1, dims=0)
