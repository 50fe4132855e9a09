from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from slimdown.core import Preprocess
from slimdown.load.batches import ImageBatches, Samples, in_order, shuffled
from slimdown.load.images import CachedImages


@pytest.fixture
def samples(noise: Callable[..., Any]) -> Samples:
    images = CachedImages(torch.from_numpy(noise(30, 1, 4, 4)))
    return Samples(images, torch.arange(30), tuple(range(5, 28)))


def test_in_order_takes_everything(samples: Samples) -> None:
    order = in_order(samples, 10)
    assert [len(batch) for batch in order] == [10, 10, 3]
    assert sum(order, ()) == samples.indices


@pytest.mark.parametrize(("batch_size", "sizes"), [(10, [10, 10]), (23, [23]), (64, [23])])
def test_shuffled_batches_are_whole(samples: Samples, batch_size: int, sizes: list[int]) -> None:
    order = shuffled(samples, batch_size, seed=0)
    flat = [index for batch in order for index in batch]
    assert [len(batch) for batch in order] == sizes
    assert len(set(flat)) == len(flat)
    assert set(flat) <= set(samples.indices)
    assert order == shuffled(samples, batch_size, seed=0)
    assert order != shuffled(samples, batch_size, seed=1)


def test_batches_belong_together(samples: Samples) -> None:
    preprocess = Preprocess(size=(4, 4), channels="L", mean=(0.0,), std=(1.0,))
    batches = ImageBatches(samples, [[7, 9], [6]], preprocess)
    assert len(batches) == 2
    first, second = batches
    assert first.targets.tolist() == [7, 9]
    assert second.targets.dtype == torch.int64
    expected = samples.images.load([7, 9])[0] / 255
    torch.testing.assert_close(first.inputs, expected)
