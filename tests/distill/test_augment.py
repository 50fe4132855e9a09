"""Augmented images against torchvision's functions on one image at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor
from torchvision.transforms import v2

from slimdown.distill.augment import (
    augment,
    mix_up,
    neighbors,
    random_crop,
    random_flip,
    random_resized_crop,
)


def _generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def _is_among(image: Tensor, candidates: list[Tensor]) -> bool:
    return any(torch.equal(image, candidate) for candidate in candidates)


def test_every_crop_is_a_window_of_the_padded_image() -> None:
    images = torch.randn(20, 3, 16, 24)
    padded = v2.functional.pad(images, [3, 2], padding_mode="reflect")
    for image, wide in zip(random_crop(images, _generator()), padded, strict=True):
        windows = [
            v2.functional.crop(wide, top, left, 16, 24) for top in range(5) for left in range(7)
        ]
        assert _is_among(image, windows)


def test_every_image_is_flipped_or_left() -> None:
    images = torch.randn(64, 3, 5, 6)
    flipped = random_flip(images, _generator())
    for image, original in zip(flipped, images, strict=True):
        assert _is_among(image, [original, v2.functional.horizontal_flip(original)])
    num_left = sum(torch.equal(a, b) for a, b in zip(flipped, images, strict=True))
    assert 16 < num_left < 48


def test_a_box_of_the_whole_image_changes_nothing() -> None:
    images = torch.randn(4, 3, 80, 96)
    same = random_resized_crop(images, _generator(), area=(1, 1), ratio=(1, 1))
    torch.testing.assert_close(same, images, atol=1e-4, rtol=1e-4)


def test_a_box_is_what_torchvision_resizes() -> None:
    # a square box of a quarter of the area; its position is read off a ramp of coordinates
    down, right = torch.meshgrid(torch.arange(80.0), torch.arange(80.0), indexing="ij")
    image = torch.stack([down, right, torch.sin(down / 3) * torch.cos(right / 5)])[None]
    crop = random_resized_crop(image, _generator(4), area=(0.25, 0.25), ratio=(1, 1))[0]
    top, left = (float(crop[i, 20:60, 20:60].mean()) - 19.5 for i in (0, 1))
    whole = [round(top), round(left)]
    expected = v2.functional.resized_crop(image[0], *whole, 40, 40, [80, 80], antialias=False)
    inner = (slice(None), slice(8, 72), slice(8, 72))
    assert (crop[:2][inner] - expected[:2][inner]).abs().max() <= 0.51  # rounded to whole pixels
    assert (crop[2][inner[1:]] - expected[2][inner[1:]]).abs().max() < 0.25


def test_boxes_stay_inside_the_image() -> None:
    down, right = torch.meshgrid(torch.arange(72.0), torch.arange(96.0), indexing="ij")
    images = torch.stack([down, right]).expand(64, 2, 72, 96)
    crops = random_resized_crop(images, _generator())
    slopes = crops.diff(dim=-1)[:, 1, :, 10:-10]
    assert bool((slopes > 0.3).all())
    assert bool((slopes < 1.01).all())
    assert crops.shape == images.shape


@pytest.mark.parametrize("size", [8, 32, 80])
@pytest.mark.parametrize("kind", ["crop", "flip-crop"])
def test_equal_generators_give_equal_images(size: int, kind: str) -> None:
    images = torch.randn(6, 3, size, size)
    state = torch.get_rng_state()
    first = augment(images, kind, _generator(1))  # type: ignore[arg-type]
    again = augment(images, kind, _generator(1))  # type: ignore[arg-type]
    other = augment(images, kind, _generator(2))  # type: ignore[arg-type]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == images.shape
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone


def test_none_is_no_augmentation() -> None:
    images = torch.randn(2, 3, 8, 8)
    assert augment(images, "none", _generator()) is images


def test_without_flips_text_stays_readable() -> None:
    ramp = torch.arange(32.0).expand(50, 1, 32, 32)
    crops = augment(ramp, "crop", _generator())
    assert bool((crops[..., 8:24].diff(dim=-1) == 1).all())


def test_blending_is_that_of_torchvision() -> None:
    images, labels = torch.randn(6, 3, 4, 4), torch.arange(6)
    torch.manual_seed(0)
    mixed, shares = v2.MixUp(alpha=1.0, num_classes=6)(images, labels)
    share = float(shares[0, 0])
    torch.testing.assert_close(mix_up(images, share), mixed)
    assert neighbors(labels).tolist() == [5, 0, 1, 2, 3, 4]
