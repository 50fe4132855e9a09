"""Small image folders and archives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

Pixels = npt.NDArray[np.uint8]


@pytest.fixture
def noise() -> Callable[..., Pixels]:
    """Different random pixels at every call: noise(4, 16, 16, 3)."""
    generator = np.random.default_rng(0)
    return lambda *shape: generator.integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def write_images(noise: Callable[..., Pixels]) -> Callable[..., None]:
    """Write `count` different PNG images of `size` (height, width) into a folder."""

    def write(
        folder: Path, count: int, size: tuple[int, int] = (16, 16), suffix: str = ".png"
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.fromarray(noise(*size, 3)).save(folder / f"{index:03d}{suffix}")

    return write


@pytest.fixture
def image_folder(tmp_path: Path, write_images: Callable[..., None]) -> Path:
    """train: 12 cats and 8 dogs; test: 5 of each; 16x16."""
    for part, name, count in [
        ("train", "cat", 12),
        ("train", "dog", 8),
        ("test", "cat", 5),
        ("test", "dog", 5),
    ]:
        write_images(tmp_path / "images" / part / name, count)
    return tmp_path / "images"


@pytest.fixture
def write_npz(tmp_path: Path, noise: Callable[..., Pixels]) -> Callable[..., Path]:
    """Write an archive of 16x16 images of three classes, or of the arrays given."""

    def write(name: str, count: int = 30, **arrays: object) -> Path:
        path = tmp_path / name
        content = {"X": noise(count, 16, 16, 3), "Y": np.arange(count) % 3, **arrays}
        np.savez(path, **{key: value for key, value in content.items() if value is not None})  # type: ignore[arg-type]
        return path

    return write
