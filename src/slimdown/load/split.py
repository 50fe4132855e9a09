"""Which images train, validate, calibrate and judge."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slimdown.errors import BadInput
from slimdown.load.batches import Samples
from slimdown.load.raw import Labels
from slimdown.load.source import DataSource


@dataclass(frozen=True, kw_only=True)
class Split:
    """The parts of a task. Calibration images train as well, but never judge."""

    train: Samples | None
    validation: Samples | None
    calibration: Samples
    test: Samples | None
    notes: tuple[str, ...] = ()


def split_samples(samples: Mapping[str, Samples], source: DataSource) -> Split:
    """Split what a reader found: "train" or "test" or both, and "validation" where there is one."""
    if "train" in samples:
        return split_train(samples["train"], samples.get("validation"), samples.get("test"), source)
    return split_test(samples["test"], source)


def split_train(
    train: Samples, validation: Samples | None, test: Samples | None, source: DataSource
) -> Split:
    """Hold out validation images where there are none yet, and choose calibration images.

    Raises BadInput where no calibration image is left that is not a test image too.
    """
    if validation is None:
        train, validation = _hold_out(train, source)
    chosen = _choose(train, source.calibration, seed=source.seed)
    calibration = chosen if test is None else without_copies(chosen, test)
    if not len(calibration):
        raise BadInput(
            "no image is left for calibration: all that were chosen are test images too, so the "
            "training and the test images seem to be the same"
        )
    notes = []
    if len(chosen) < source.calibration:
        notes.append(
            f"data.calibration asks for {source.calibration} images and takes all {len(chosen)} "
            "that there are to train on"
        )
    if num_copies := len(chosen) - len(calibration):
        notes.append(
            f"{num_copies} of {len(chosen)} training images chosen for calibration are test images "
            "too and are left out; training on test images flatters every score"
        )
    return Split(
        train=train, validation=validation, calibration=calibration, test=test, notes=tuple(notes)
    )


def split_test(test: Samples, source: DataSource) -> Split:
    """Without training images: part of the test images calibrate, and only the others judge.

    Raises BadInput unless the user asked for that, and where it leaves no image to judge on.
    """
    if not source.calibration_from_test:
        raise BadInput(
            "the data have no training images to calibrate with: give data.train, or set "
            f"data.calibration_from_test to take {source.calibration} of the {len(test)} test "
            "images, which then are not judged on"
        )
    if source.calibration >= len(test):
        raise BadInput(
            f"data.calibration takes {source.calibration} of {len(test)} test images, which leaves "
            "none to judge on: lower it"
        )
    chosen = _choose(test, source.calibration, seed=source.seed)
    rest = test.select(np.setdiff1d(test.indices, chosen.indices))
    calibration = without_copies(chosen, rest)
    if not len(calibration):
        raise BadInput("all images chosen for calibration occur again among the test images")
    note = f"{len(chosen)} of {len(test)} test images calibrate and are not judged on"
    return Split(train=None, validation=None, calibration=calibration, test=rest, notes=(note,))


def pick(labels: Labels | None, size: int, count: int, *, seed: int) -> npt.NDArray[np.int64]:
    """Pick `count` of `size` images at random, each class in its proportion: their indices.

    Every class gets its share to within one image, and the order mixes the classes evenly.
    Without labels the choice is random alone.
    """
    order = np.random.default_rng(seed).permutation(size)
    if labels is None:
        return order[:count]
    classes, sizes = np.unique(labels, return_counts=True)
    chosen, places = [], []
    for label, quota in zip(classes, _apportion(sizes, min(count, size)), strict=True):
        chosen.append(order[labels[order] == label][:quota])
        places.append((np.arange(quota) + 0.5) / max(quota, 1))
    mixed = np.argsort(np.concatenate(places), kind="stable")
    picked: npt.NDArray[np.int64] = np.concatenate(chosen)[mixed]
    return picked


def _apportion(sizes: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Share `count` out in proportion to `sizes`: whole parts first, then largest remainders."""
    shares = count * sizes / sizes.sum()
    quotas: npt.NDArray[np.int64] = np.floor(shares).astype(np.int64)
    neediest = np.argsort(quotas - shares, kind="stable")
    quotas[neediest[: count - quotas.sum()]] += 1
    return quotas


def without_copies(samples: Samples, others: Samples) -> Samples:
    """Those of `samples` whose image is not, byte for byte, among `others` as well."""
    lengths = {samples.images.num_bytes(index) for index in samples.indices}
    known = {
        _digest(others, index)
        for index in others.indices
        if others.images.num_bytes(index) in lengths  # tells most files apart without reading them
    }
    return samples.select([i for i in samples.indices if _digest(samples, i) not in known])


def _hold_out(train: Samples, source: DataSource) -> tuple[Samples, Samples | None]:
    count = round(source.validation * len(train))
    if train.labels is None or count == 0:
        return train, None
    held_out = _choose(train, count, seed=source.seed)
    rest = np.setdiff1d(train.indices, held_out.indices)
    return train.select(rest), train.select(np.sort(held_out.indices))


def _choose(samples: Samples, count: int, *, seed: int) -> Samples:
    indices = np.asarray(samples.indices)
    labels = None if samples.labels is None else samples.labels.numpy()[indices]
    return samples.select(indices[pick(labels, len(samples), count, seed=seed)])


def _digest(samples: Samples, index: int) -> bytes:
    return hashlib.sha256(samples.images.content(index)).digest()
