"""Images and labels as the readers find them, before any preprocessing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from PIL.Image import open as open_image  # bound here: ultralytics exchanges it for its own

from slimdown.core import Preprocess
from slimdown.errors import BadInput

Labels: TypeAlias = npt.NDArray[np.int64]

# Only these decoders: Pillow picks one by content, and others run outside programs.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
NUM_PROBED = 16


class RawImages(Protocol):
    """Images by index, decoded when asked for."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> Image.Image:
        """Decode an image, upright; an error is about this image alone."""
        ...

    def name(self, index: int) -> str:
        """What the user knows the image by."""
        ...

    def num_bytes(self, index: int) -> int:
        """The length of `content`, found without reading it."""
        ...

    def content(self, index: int) -> bytes:
        """The bytes that two equal images share."""
        ...

    def stamp(self, index: int) -> str:
        """What changes when the image does, found fast."""
        ...


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> Image.Image:
        with open_image(self.paths[index], formats=FORMATS) as image:
            return ImageOps.exif_transpose(image)  # cameras store how they were held

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def num_bytes(self, index: int) -> int:
        return self.paths[index].stat().st_size

    def content(self, index: int) -> bytes:
        return self.paths[index].read_bytes()

    def stamp(self, index: int) -> str:
        path = self.paths[index]
        found = path.stat()
        return f"{path.parent.name}/{path.name} {found.st_size} {found.st_mtime_ns}"


@dataclass(frozen=True, eq=False)
class ImageArray:
    """uint8 (N, H, W) or (N, H, W, 3), of `origin`."""

    pixels: npt.NDArray[np.uint8]
    origin: str

    def __len__(self) -> int:
        return len(self.pixels)

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def name(self, index: int) -> str:
        return f"{self.origin}[{index}]"

    def num_bytes(self, index: int) -> int:
        return int(self.pixels[index].nbytes)

    def content(self, index: int) -> bytes:
        return bytes(self.pixels[index].tobytes())

    def stamp(self, index: int) -> str:
        return hashlib.sha256(self.content(index)).hexdigest()


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A map-style data set whose samples begin with a Pillow image, of `origin`."""

    dataset: Any
    origin: str

    def __len__(self) -> int:
        return len(self.dataset)

    def open(self, index: int) -> Image.Image:
        image = self.dataset[index][0]
        if not isinstance(image, Image.Image):
            raise BadInput(f"{self.origin} gives {type(image).__name__}, not Pillow images")
        return image

    def name(self, index: int) -> str:
        return f"{self.origin}[{index}]"

    def num_bytes(self, index: int) -> int:
        return len(self.content(index))

    def content(self, index: int) -> bytes:
        return self.open(index).tobytes()

    def stamp(self, index: int) -> str:
        return hashlib.sha256(self.content(index)).hexdigest()


@dataclass(frozen=True, eq=False)
class RawSet:
    """Images with their labels, (N,) from 0; None where they have none."""

    images: RawImages
    labels: Labels | None


@dataclass(frozen=True, kw_only=True, eq=False)
class RawData:
    """What a reader found, with what it knows of such data."""

    train: RawSet | None
    test: RawSet | None
    """None where the images have no labels to judge by; there are no classes then."""
    validation: RawSet | None = None
    classes: tuple[str, ...]
    preprocess: Preprocess
    """The default; the user's own comes first."""
    flip: bool = True
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.train is not None or self.test is not None
        if self.test is not None and len(self.classes) < 2:
            raise BadInput(
                f"a classification needs at least two classes, found {list(self.classes)}"
            )
        for part in (self.train, self.validation, self.test):
            if part is not None and part.labels is not None:
                _check_labels(part, len(self.classes))

    def probe(self) -> list[Image.Image]:
        """Open a few images of the first part that there is."""
        first = self.train or self.test
        assert first is not None
        return probe(first.images)


def probe(images: RawImages) -> list[Image.Image]:
    """Open a few images, evenly over the set; those that cannot be opened are judged later."""
    chosen = sorted({int(i) for i in np.linspace(0, len(images) - 1, NUM_PROBED)})
    opened = [_open_or_none(images, index) for index in chosen]
    return [image for image in opened if image is not None]


def _open_or_none(images: RawImages, index: int) -> Image.Image | None:
    try:
        return images.open(index)
    except Exception:  # a decoder may raise anything
        return None


def _check_labels(part: RawSet, num_classes: int) -> None:
    assert part.labels is not None
    outside = np.flatnonzero((part.labels < 0) | (part.labels >= num_classes))
    if outside.size:
        first = int(outside[0])
        raise BadInput(
            f"labels must be in 0..{num_classes - 1}, got {part.labels[first]} for "
            f"{part.images.name(first)} and {outside.size} such labels in all"
        )
