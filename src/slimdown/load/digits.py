"""The embedded digits: 1,797 handwritten ones of 8x8 pixels (see NOTICE)."""

from __future__ import annotations

from importlib import resources

import numpy as np

from slimdown.core import Preprocess
from slimdown.load.raw import ImageArray, RawData, RawSet
from slimdown.load.source import DataSource
from slimdown.load.split import pick

BRIGHTEST = 16
NUM_TEST = 500
SPLIT_SEED = 0
"""Fixed: every run is judged on the same 500 images."""

DIGITS_PREPROCESS = Preprocess(
    size=(32, 32), resize=32, interpolation="bicubic", channels="L", mean=(0.3,), std=(0.35,)
)
"""What `digits_net` takes."""


def read_digits(source: DataSource) -> RawData:
    """Read the digits that slimdown brings along: 1,297 to train on and 500 to judge on."""
    with (
        resources.files("slimdown.load").joinpath("digits.npz").open("rb") as file,
        np.load(file, allow_pickle=False) as arrays,
    ):
        shades, labels = arrays["X"], arrays["Y"].astype(np.int64)
    pixels = np.round(shades * (255 / BRIGHTEST)).astype(np.uint8)
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[pick(labels, len(labels), NUM_TEST, seed=SPLIT_SEED)] = True
    return RawData(
        train=RawSet(ImageArray(pixels[~chosen], "digits train"), labels[~chosen]),
        test=RawSet(ImageArray(pixels[chosen], "digits test"), labels[chosen]),
        classes=tuple("0123456789"),
        preprocess=DIGITS_PREPROCESS,
        flip=False,
    )
