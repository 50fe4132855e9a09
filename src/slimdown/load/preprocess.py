"""Image -> network input, the same way in training, calibration, scoring and deployment."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from slimdown.core import Preprocess
from slimdown.errors import BadInput

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LARGEST_AS_IS = 256

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def apply_preprocess(image: Image.Image | npt.NDArray[np.uint8], preprocess: Preprocess) -> Tensor:
    """Turn an image, or uint8 (H, W) or (H, W, 3) RGB, into (C, H, W) float32.

    Raises BadInput for an image smaller than the crop, or of a pixel type other than 8 or 16 bits.
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    return normalize(torch.from_numpy(to_pixels(image, preprocess)), preprocess)


def to_pixels(image: Image.Image, preprocess: Preprocess) -> npt.NDArray[np.uint8]:
    """All of the preprocessing but the arithmetic: (C, H, W) uint8 in the order of `channels`."""
    image = _convert(image, "L" if preprocess.channels == "L" else "RGB")
    image = _crop(_resize(image, preprocess), preprocess.size)
    pixels = np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)
    if preprocess.channels == "BGR":
        pixels = pixels[::-1]
    return np.array(pixels, order="C")  # Pillow's own memory is read-only


def normalize(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """(..., C, H, W) uint8 -> float32, `(x / 255 - mean) / std` with one value a channel."""
    mean = torch.tensor(preprocess.mean, device=pixels.device)[:, None, None]
    std = torch.tensor(preprocess.std, device=pixels.device)[:, None, None]
    return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)


def default_preprocess(images: Sequence[Image.Image], *, gray: bool) -> Preprocess:
    """What suits images like these, where the user did not say.

    Images of one moderate size are taken as they are; others as ImageNet is usually evaluated.
    """
    sizes = {image.size for image in images}
    width, height = sizes.pop() if len(sizes) == 1 else (LARGEST_AS_IS + 1,) * 2
    as_is = max(width, height) <= LARGEST_AS_IS
    return Preprocess(
        size=(height, width) if as_is else (224, 224),
        resize=None if as_is else 256,
        mean=(0.5,) if gray else IMAGENET_MEAN,
        std=(0.5,) if gray else IMAGENET_STD,
        channels="L" if gray else "RGB",
    )


def is_gray(image: Image.Image) -> bool:
    """Whether an image has one channel of brightness."""
    return image.mode in ("1", "L", "LA") or image.mode.startswith("I;16")


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow would clip the values at 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise BadInput(f"images have 8 or 16 bits a channel, got one of 32 (mode {image.mode!r})")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns when it is left out
    return image if image.mode == mode else image.convert(mode)


def _resize(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    width, height = image.size
    shorter = min(width, height)
    if preprocess.resize is None or preprocess.resize == shorter:
        return image
    # The longer side is rounded down, as torchvision does.
    size = (preprocess.resize * width // shorter, preprocess.resize * height // shorter)
    return image.resize(size, _FILTERS[preprocess.interpolation])


def _crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    (height, width), (columns, rows) = size, image.size
    if (height, width) == (rows, columns):
        return image
    if height > rows or width > columns:
        raise BadInput(
            f"an image of {rows}x{columns} is smaller than preprocess.size {height}x{width}: set "
            "preprocess.resize so that the shorter side is at least that"
        )
    # round() halves to even, as torchvision does.
    top, left = round((rows - height) / 2), round((columns - width) / 2)
    return image.crop((left, top, left + width, top + height))
