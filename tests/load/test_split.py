from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimdown.errors import BadInput
from slimdown.load import DataSource
from slimdown.load.batches import Samples
from slimdown.load.images import CachedImages
from slimdown.load.split import pick, split_test, split_train, without_copies

SETTINGS = DataSource(kind="digits", calibration=10)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.integers(0, 80), st.integers(0, 9))
@settings(deadline=None)
def test_every_class_gets_its_share(labels: list[int], count: int, seed: int) -> None:
    array = np.array(labels)
    chosen = pick(array, len(array), count, seed=seed)
    assert len(chosen) == len(set(chosen.tolist())) == min(count, len(array))
    for label in set(labels):
        share = len(chosen) * labels.count(label) / len(labels)
        assert abs((array[chosen] == label).sum() - share) <= 1


def test_pick_depends_on_the_seed_alone() -> None:
    labels = np.arange(50) % 3
    first = pick(labels, 50, 9, seed=1)
    np.testing.assert_array_equal(first, pick(labels, 50, 9, seed=1))
    assert not np.array_equal(first, pick(labels, 50, 9, seed=2))
    assert len(set(pick(None, 50, 50, seed=0).tolist())) == 50


@pytest.fixture
def samples(noise: Callable[..., Any]) -> Callable[[int], Samples]:
    def make(count: int) -> Samples:
        images = CachedImages(torch.from_numpy(noise(count, 3, 4, 4)))
        return Samples(images, torch.arange(count) % 2, tuple(range(count)))

    return make


def pixels(samples: Samples) -> Tensor:
    return samples.images.load(samples.indices)[0]


def test_parts_are_disjoint_and_whole(samples: Callable[[int], Samples]) -> None:
    split = split_train(samples(40), None, samples(20), SETTINGS)
    assert split.train is not None
    assert split.validation is not None
    assert (len(split.train), len(split.validation)) == (36, 4)
    assert set(split.train.indices) | set(split.validation.indices) == set(range(40))
    assert set(split.calibration.indices) <= set(split.train.indices)
    assert split.calibration.labels is not None
    assert split.calibration.labels[list(split.calibration.indices)].sum() == 5
    assert split.notes == ()


def test_a_validation_set_of_its_own_is_left_whole(samples: Callable[[int], Samples]) -> None:
    split = split_train(samples(40), samples(6), samples(20), SETTINGS)
    assert split.train is not None
    assert split.validation is not None
    assert (len(split.train), len(split.validation)) == (40, 6)


def test_calibration_images_that_are_test_images_are_left_out(
    samples: Callable[[int], Samples],
) -> None:
    train, test = samples(10), samples(20)
    assert isinstance(train.images, CachedImages)
    test.images.pixels[3:6] = train.images.pixels[:3]  # type: ignore[attr-defined]
    settings = DataSource(kind="digits", calibration=10, validation=0.0)
    split = split_train(train, None, test, settings)
    assert len(split.calibration) == 7
    assert without_copies(split.calibration, test).indices == split.calibration.indices
    assert "3 of 10 training images chosen for calibration are test images too" in split.notes[0]


def test_refuses_train_and_test_that_are_the_same(samples: Callable[[int], Samples]) -> None:
    train = samples(20)
    with pytest.raises(BadInput, match="no image is left for calibration"):
        split_train(train, None, train, SETTINGS)


def test_tells_when_there_are_fewer_images_to_calibrate_with(
    samples: Callable[[int], Samples],
) -> None:
    split = split_train(samples(8), None, samples(4), SETTINGS)
    assert "asks for 10 images and takes all 7" in split.notes[0]


def test_test_images_calibrate_only_when_asked_to(samples: Callable[[int], Samples]) -> None:
    test = samples(30)
    with pytest.raises(BadInput, match=r"no training images .*calibration_from_test"):
        split_test(test, SETTINGS)
    asked = DataSource(kind="digits", calibration=10, calibration_from_test=True)
    split = split_test(test, asked)
    assert split.train is None
    assert (len(split.calibration), len(split.test)) == (10, 20)
    assert not set(split.calibration.indices) & set(split.test.indices)
    assert "10 of 30 test images calibrate" in split.notes[0]
    with pytest.raises(BadInput, match="leaves none to judge on"):
        split_test(samples(10), asked)


def test_copies_are_found_by_content(samples: Callable[[int], Samples]) -> None:
    ones, others = samples(5), samples(5)
    others.images.pixels[4] = ones.images.pixels[2]  # type: ignore[attr-defined]
    assert without_copies(ones, others).indices == (0, 1, 3, 4)
    assert without_copies(ones, others.select([0, 1])).indices == (0, 1, 2, 3, 4)
    assert pixels(ones.select([2])).shape == (1, 3, 4, 4)
