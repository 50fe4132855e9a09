from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from slimdown.core import Preprocess
from slimdown.errors import BadInput
from slimdown.load import apply_preprocess
from slimdown.load.preprocess import default_preprocess, normalize, to_pixels

Noise = Callable[..., Any]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def by_torchvision(image: Image.Image, preprocess: Preprocess) -> torch.Tensor:
    """The same steps, by the library that most models were trained with."""
    gray = preprocess.channels == "L"
    steps: list[Any] = [v2.Grayscale()] if gray else [v2.RGB()]
    if preprocess.resize is not None:
        how = v2.InterpolationMode(preprocess.interpolation)
        steps.append(v2.Resize(preprocess.resize, interpolation=how, antialias=True))
    steps += [v2.CenterCrop(preprocess.size), v2.ToImage()]
    if preprocess.channels == "BGR":
        steps.append(v2.Lambda(lambda x: x.flip(0)))
    steps += [
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(preprocess.mean, preprocess.std),
    ]
    return v2.Compose(steps)(image).as_subclass(torch.Tensor)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("channels", ["RGB", "BGR", "L"])
@pytest.mark.parametrize("source", [(40, 57), (57, 40), (33, 33), (20, 91)])
@pytest.mark.parametrize(("resize", "size"), [(36, (32, 32)), (25, (25, 20)), (None, (19, 20))])
def test_equals_torchvision(
    noise: Noise, interpolation: Any, channels: Any, source: tuple[int, int], resize: Any, size: Any
) -> None:
    gray = channels == "L"
    preprocess = Preprocess(
        size=size,
        resize=resize,
        interpolation=interpolation,
        channels=channels,
        mean=MEAN[:1] if gray else MEAN,
        std=STD[:1] if gray else STD,
    )
    image = Image.fromarray(noise(*source, 3))
    ours = apply_preprocess(image, preprocess)
    assert ours.dtype == torch.float32
    assert ours.shape == (1 if gray else 3, *size)
    torch.testing.assert_close(ours, by_torchvision(image, preprocess), rtol=1e-6, atol=1e-6)


def test_takes_arrays(noise: Noise) -> None:
    preprocess = Preprocess(size=(8, 8), mean=MEAN, std=STD)
    pixels = noise(8, 8, 3)
    expected = (pixels / 255 - np.array(MEAN)) / np.array(STD)
    ours = apply_preprocess(pixels, preprocess)
    np.testing.assert_allclose(ours.numpy(), expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-6)


def test_gray_images_become_three_equal_channels(noise: Noise) -> None:
    pixels = to_pixels(Image.fromarray(noise(8, 8)), Preprocess(size=(8, 8), mean=MEAN, std=STD))
    assert pixels.shape == (3, 8, 8)
    assert (pixels[0] == pixels[2]).all()


def test_16_bit_images_are_scaled_and_not_clipped() -> None:
    shades = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    gray = Preprocess(size=(8, 8), channels="L", mean=(0.0,), std=(1.0,))
    tensor = apply_preprocess(Image.fromarray(shades), gray)
    np.testing.assert_allclose(tensor[0].numpy(), shades / 65535, atol=1 / 255)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_refuses_32_bit_images(mode: str) -> None:
    image = Image.new(mode, (8, 8))
    with pytest.raises(BadInput, match="8 or 16 bits"):
        apply_preprocess(image, Preprocess(size=(8, 8), mean=MEAN, std=STD))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "1"])
def test_takes_the_other_kinds_of_images(mode: str) -> None:
    image = Image.new(mode, (8, 8))
    if mode == "P":
        image.info["transparency"] = b"\x00"
    assert apply_preprocess(image, Preprocess(size=(8, 8), mean=MEAN, std=STD)).shape == (3, 8, 8)


def test_refuses_to_pad_small_images(noise: Noise) -> None:
    with pytest.raises(BadInput, match=r"8x6 is smaller than preprocess\.size 8x8"):
        apply_preprocess(noise(8, 6, 3), Preprocess(size=(8, 8), mean=MEAN, std=STD))


def test_normalize_keeps_its_argument(noise: Noise) -> None:
    pixels = torch.from_numpy(noise(2, 3, 8, 8))
    before = pixels.clone()
    normalize(pixels, Preprocess(size=(8, 8), mean=MEAN, std=STD))
    assert torch.equal(pixels, before)


def test_default_takes_images_of_one_size_as_they_are() -> None:
    found = default_preprocess([Image.new("RGB", (48, 32))] * 2, gray=False)
    assert (found.size, found.resize, found.channels) == ((32, 48), None, "RGB")


def test_default_is_imagenets_for_all_others() -> None:
    for images in ([Image.new("RGB", (48, 32)), Image.new("RGB", (9, 9))],):
        assert default_preprocess(images, gray=False) == Preprocess(
            size=(224, 224), resize=256, mean=MEAN, std=STD
        )
    assert default_preprocess([Image.new("RGB", (900, 900))], gray=False).resize == 256
