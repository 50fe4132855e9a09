from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from slimdown.core import Preprocess
from slimdown.errors import BadInput
from slimdown.load import DataWarning
from slimdown.load.images import StreamedImages, cache, judge_broken, map_ahead
from slimdown.load.raw import ImageArray, ImageFiles

PLAIN = Preprocess(size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture
def files(tmp_path: Path, write_images: Callable[..., None]) -> ImageFiles:
    """300 images in two formats."""
    write_images(tmp_path / "a", 280)
    write_images(tmp_path / "b", 20, suffix=".jpg")
    return ImageFiles(sorted(tmp_path.rglob("*.*")))


def break_images(files: ImageFiles, *indices: int) -> None:
    """Truncate files, as an interrupted copy does."""
    for index in indices:
        content = files.paths[index].read_bytes()
        files.paths[index].write_bytes(content[: len(content) // 2])


def test_cached_and_streamed_images_are_equal(files: ImageFiles) -> None:
    cached, kept, broken = cache(files, PLAIN, num_workers=2)
    streamed = StreamedImages(files, PLAIN, num_workers=2)
    assert kept == list(range(300))
    assert not broken
    indices = [299, 0, 5, 5]
    for images in (cached, streamed):
        pixels, loaded = images.load(indices)
        assert loaded == indices
        expected = np.stack([np.asarray(Image.open(files.paths[i])) for i in indices])
        np.testing.assert_array_equal(pixels.numpy().transpose(0, 2, 3, 1), expected)


def test_broken_images_are_left_out_of_the_cache(files: ImageFiles) -> None:
    break_images(files, 0, 290)
    whole, _, _ = cache(ImageFiles(files.paths[1:3]), PLAIN, num_workers=1)
    cached, kept, broken = cache(files, PLAIN, num_workers=2)
    assert kept == [index for index in range(300) if index not in (0, 290)]
    assert set(broken) == {files.name(0), files.name(290)}
    assert torch.equal(cached.load([0, 1])[0], whole.load([0, 1])[0])
    (note,) = judge_broken(broken, 300)
    assert "2 of 300 images (0.67%) cannot be read and are left out" in note
    assert files.name(290) in note


def test_too_many_broken_images_are_refused_and_listed(files: ImageFiles) -> None:
    break_images(files, *range(12))
    _, _, broken = cache(files, PLAIN, num_workers=2)
    with pytest.raises(BadInput, match=r"12 of 300 images \(4\.00%\) cannot be read") as refused:
        judge_broken(broken, 300)
    assert files.name(0) in str(refused.value)
    assert "and 2 more" in str(refused.value)


def test_streams_skip_broken_images_and_tell_once(files: ImageFiles) -> None:
    break_images(files, 3)
    streamed = StreamedImages(files, PLAIN, num_workers=1)
    with pytest.warns(DataWarning, match=r"003\.png cannot be read and is left out"):
        pixels, kept = streamed.load([2, 3, 4])
    assert kept == [2, 4]
    assert pixels.shape == (2, 3, 16, 16)
    assert streamed.load([3])[1] == []
    break_images(files, *range(10, 20))
    with pytest.raises(BadInput, match="cannot be read"), pytest.warns(DataWarning):
        streamed.load(range(30))


def test_an_image_that_is_too_small_is_an_error_of_its_own(noise: Callable[..., Any]) -> None:
    with pytest.raises(BadInput, match=r"small\[0\]: an image of 9x9 is smaller"):
        cache(ImageArray(noise(300, 9, 9, 3), "small"), PLAIN, num_workers=1)


def test_fingerprints_change_with_the_images(files: ImageFiles, noise: Callable[..., Any]) -> None:
    def fingerprints() -> tuple[str, str]:
        return (
            cache(files, PLAIN, num_workers=2)[0].fingerprint(),
            StreamedImages(files, PLAIN, num_workers=1).fingerprint(),
        )

    before = fingerprints()
    assert fingerprints() == before
    Image.fromarray(noise(16, 16, 3)).save(files.paths[7])
    after = fingerprints()
    assert after[0] != before[0]
    assert after[1] != before[1]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_maps_in_order(num_workers: int) -> None:
    assert list(map_ahead(lambda x: x * x, range(20), num_workers=num_workers)) == [
        x * x for x in range(20)
    ]


def test_does_not_run_far_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for index in range(100):
            taken.append(index)
            yield index

    before = set(threading.enumerate())  # an earlier test's may be waiting for the collector
    results = map_ahead(str, items(), num_workers=2)
    assert next(results) == "0"
    assert len(taken) <= 4
    results.close()  # type: ignore[attr-defined]
    assert set(threading.enumerate()) <= before


def test_errors_of_workers_reach_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        list(map_ahead(lambda x: 1 / x, [1, 0, 2], num_workers=2))
