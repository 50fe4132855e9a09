"""A `DataSource` -> a `ClassificationTask`: read, decode, split, check."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from slimdown.core import Preprocess
from slimdown.load.batches import Samples
from slimdown.load.classification import ClassificationTask
from slimdown.load.digits import read_digits
from slimdown.load.folder import read_folder
from slimdown.load.images import DataWarning, Images, StreamedImages, cache, judge_broken
from slimdown.load.npz import read_npz
from slimdown.load.preprocess import is_gray
from slimdown.load.raw import RawData, RawSet
from slimdown.load.source import DataSource
from slimdown.load.split import Split, split_samples
from slimdown.load.torchvision_set import read_torchvision

READERS: dict[str, Callable[[DataSource], RawData]] = {
    "digits": read_digits,
    "folder": read_folder,
    "npz": read_npz,
    "torchvision": read_torchvision,
}

MAX_CACHED_BYTES = 500 * 2**20


def load_task(
    source: DataSource, *, max_cached_bytes: int = MAX_CACHED_BYTES
) -> ClassificationTask:
    """Read the data and split them.

    Preprocessed pixels up to `max_cached_bytes` stay in memory as uint8; more of them are decoded
    whenever they are needed. Warns (DataWarning) of what the user should know. Raises BadInput for
    data that cannot be used, RecipeError for a data set that does not exist, Unsafe for pickles.
    """
    raw = READERS[source.kind](source)
    preprocess = source.preprocess or raw.preprocess
    flip = raw.flip if source.flip is None else source.flip
    samples, notes = _open_parts(raw, preprocess, source.num_workers, max_cached_bytes)
    split = split_samples(samples, source)
    settings = (asdict(preprocess), raw.classes, source.batch_size, flip)
    task = ClassificationTask(
        train=split.train,
        validation=split.validation,
        calibration=split.calibration,
        test=split.test,
        labels=raw.classes,
        preprocess=preprocess,
        batch_size=source.batch_size,
        flip=flip,
        calibration_hash=_hash(split.calibration.indices),
        fingerprint=_hash(settings, *_describe(samples, split)),
        notes=(*raw.notes, *_note_gray(raw, preprocess), *notes, *split.notes),
    )
    for note in task.notes:
        warnings.warn(note, DataWarning, stacklevel=2)
    return task


def _open_parts(
    raw: RawData, preprocess: Preprocess, num_workers: int, max_cached_bytes: int
) -> tuple[dict[str, Samples], list[str]]:
    """The parts by name, all of them in memory or none, and what is to be told of them."""
    named = {"train": raw.train, "validation": raw.validation, "test": raw.test}
    parts = {name: part for name, part in named.items() if part is not None}
    height, width = preprocess.size
    num_images = sum(len(part.images) for part in parts.values())
    fits = num_images * len(preprocess.mean) * height * width <= max_cached_bytes
    open_part = _cache_part if fits else _stream_part
    opened = {name: open_part(part, preprocess, num_workers) for name, part in parts.items()}
    samples = {name: part for name, (part, _) in opened.items()}
    return samples, [note for _, notes in opened.values() for note in notes]


def _cache_part(
    part: RawSet, preprocess: Preprocess, num_workers: int
) -> tuple[Samples, list[str]]:
    """Decode all images now; a few broken ones are left out and noted."""
    images, kept, broken = cache(part.images, preprocess, num_workers=num_workers)
    labels = None if part.labels is None else torch.from_numpy(part.labels[kept])
    return _all_of(images, labels), judge_broken(broken, len(part.images))


def _stream_part(
    part: RawSet, preprocess: Preprocess, num_workers: int
) -> tuple[Samples, list[str]]:
    """Decode images whenever they are needed."""
    images = StreamedImages(part.images, preprocess, num_workers)
    return _all_of(images, None if part.labels is None else torch.from_numpy(part.labels)), []


def _all_of(images: Images, labels: torch.Tensor | None) -> Samples:
    return Samples(images, labels, tuple(range(len(images))))


def _note_gray(raw: RawData, preprocess: Preprocess) -> list[str]:
    probed = raw.probe()
    if preprocess.channels == "L" or not probed or not all(map(is_gray, probed)):
        return []
    return [
        "the images are gray and are fed to the network as three equal channels, "
        f"because preprocess.channels is {preprocess.channels}"
    ]


def _describe(samples: dict[str, Samples], split: Split) -> list[Any]:
    """The contents of all parts, and the choices made among them."""
    contents = [
        (name, part.images.fingerprint(), None if part.labels is None else part.labels.tolist())
        for name, part in samples.items()
    ]
    chosen = (split.train, split.validation, split.calibration, split.test)
    return [contents, *(None if part is None else part.indices for part in chosen)]


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
