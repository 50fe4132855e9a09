from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slimdown.load import DataSource
from slimdown.load.digits import DIGITS_PREPROCESS, read_digits

NOTICE = Path(__file__).parent.parent.parent / "NOTICE"


def test_holds_every_digit_of_scikit_learn_once() -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    theirs = sklearn_datasets.load_digits()
    data = read_digits(DataSource(kind="digits"))
    assert data.train is not None
    parts = (data.train, data.test)
    ours = [
        (np.asarray(part.images.open(index)).tobytes(), int(part.labels[index]))
        for part in parts
        for index in range(len(part.images))
        if part.labels is not None
    ]
    scaled = np.round(theirs.images * (255 / 16)).astype(np.uint8)
    expected = [
        (pixels.tobytes(), int(label)) for pixels, label in zip(scaled, theirs.target, strict=True)
    ]
    assert sorted(ours) == sorted(expected)


def test_is_split_by_class_and_always_alike() -> None:
    data = read_digits(DataSource(kind="digits"))
    other = read_digits(DataSource(kind="digits", seed=5))
    assert data.train is not None
    assert (len(data.train.images), len(data.test.images)) == (1297, 500)
    counts = np.bincount(data.test.labels)
    assert (counts.min(), counts.max()) == (48, 51)
    np.testing.assert_array_equal(data.test.labels, other.test.labels)
    assert not data.flip
    assert data.preprocess == DIGITS_PREPROCESS


def test_notice_names_the_file() -> None:
    assert "src/slimdown/load/digits.npz" in NOTICE.read_text()
