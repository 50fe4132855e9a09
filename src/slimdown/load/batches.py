"""Samples in batches: some of the images, in a given order, preprocessed as they are taken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slimdown.core import Batch, Preprocess
from slimdown.load.images import Images, map_ahead
from slimdown.load.preprocess import normalize


@dataclass(frozen=True, eq=False)
class Samples:
    """Some of the images with their labels, (len(images),) int64, or None without labels."""

    images: Images
    labels: Tensor | None
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def select(self, indices: Iterable[int]) -> Samples:
        """Others of the same images."""
        return replace(self, indices=tuple(int(index) for index in indices))


@dataclass(frozen=True, eq=False)
class ImageBatches:
    """Batches of `samples`, preprocessed; `order` holds the image indices of each batch."""

    samples: Samples
    order: Sequence[Sequence[int]]
    preprocess: Preprocess

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        images, labels = self.samples.images, self.samples.labels
        for pixels, kept in map_ahead(images.load, self.order, num_workers=images.num_workers):
            if kept:
                inputs = normalize(pixels, self.preprocess)
                yield Batch(inputs, None if labels is None else labels[torch.tensor(kept)])


def in_order(samples: Samples, batch_size: int) -> list[tuple[int, ...]]:
    """All samples, as they come, the last batch with what is left."""
    starts = range(0, len(samples), batch_size)
    return [samples.indices[start : start + batch_size] for start in starts]


def shuffled(samples: Samples, batch_size: int, *, seed: int) -> list[list[int]]:
    """Whole batches of samples in random order; a single smaller one where there are too few.

    What is left over is dropped: a last batch of one or two would upset batch normalization.
    """
    generator = torch.Generator().manual_seed(seed)
    order = [samples.indices[i] for i in torch.randperm(len(samples), generator=generator).tolist()]
    num_batches = max(1, len(order) // batch_size)
    starts = range(0, num_batches * batch_size, batch_size)
    return [order[start : start + batch_size] for start in starts]
