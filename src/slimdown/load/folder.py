"""Image folders: one folder a class, in the order of their names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from slimdown.errors import BadInput
from slimdown.load.preprocess import default_preprocess
from slimdown.load.raw import ImageFiles, RawData, RawSet, probe
from slimdown.load.source import DataSource

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
PARTS = ("train", "val", "test")
LAYOUT = "train/<class>/*.jpg and test/<class>/*.jpg (or val/)"


def read_folder(source: DataSource) -> RawData:
    """Read an image folder. Raises BadInput where its layout or its classes do not hold together.

    Hidden files and files that are no images are passed over; images lie at any depth.
    """
    if source.is_unlabeled:
        return _read_unlabeled(source)
    train_path, validation_path, test_path = _find_parts(source)
    classes = _class_names(test_path)
    if not classes:
        raise BadInput(
            f"{test_path} holds no class folders with images: test images need labels, {LAYOUT}"
        )
    train = None if train_path is None else _read_train(train_path, classes, test_path)
    validation = None if validation_path is None else _read_part(validation_path, classes)
    test = _read_part(test_path, classes)
    probed = probe((train or test).images)
    return RawData(
        train=train,
        validation=validation,
        test=test,
        classes=classes,
        preprocess=default_preprocess(probed, gray=False),
        notes=tuple(_notes(train_path, classes, train)),
    )


def find_layout(path: Path) -> Literal["root", "train", "test"]:
    """Which of data's paths a folder is: the `root` of several parts, a `test` of class folders, or
    images without labels to `train` on.

    One that does not exist is a `root`, and is refused when it is read.
    """
    if not path.is_dir() or any((path / part).is_dir() for part in PARTS):
        return "root"
    return "test" if len(_class_names(path)) > 1 else "train"


def _read_unlabeled(source: DataSource) -> RawData:
    assert source.train is not None
    train = _read_images(_need(source.train))
    return RawData(
        train=train,
        test=None,
        classes=(),
        preprocess=default_preprocess(probe(train.images), gray=False),
        notes=("there are no test images with labels, so no accuracy is judged",),
    )


def _find_parts(source: DataSource) -> tuple[Path | None, Path | None, Path]:
    """The folders to train on, to validate on and to judge on."""
    if source.root is None:
        assert source.test is not None
        return _existing(source.train), None, _need(source.test)
    root = _need(source.root)
    found = {name: root / name for name in PARTS if (root / name).is_dir()}
    if "test" in found:
        return found.get("train"), found.get("val"), found["test"]
    if "val" in found:
        return found.get("train"), None, found["val"]
    raise BadInput(f"{root} has neither test/ nor val/ to judge on: lay it out as {LAYOUT}")


def _need(path: Path) -> Path:
    if not path.is_dir():
        raise BadInput(f"there is no folder {path}")
    return path


def _existing(path: Path | None) -> Path | None:
    return None if path is None else _need(path)


def _read_train(path: Path, classes: tuple[str, ...], test_path: Path) -> RawSet:
    """Labeled by class folders that are those of the test set, or images without labels."""
    own = _class_names(path)
    if not own:
        return _read_images(path)
    if own != classes:
        raise BadInput(
            f"{path} and {test_path} must have the same class folders with images; only in the "
            f"first: {sorted(set(own) - set(classes))}, only in the second: "
            f"{sorted(set(classes) - set(own))}"
        )
    return _read_part(path, classes)


def _read_images(path: Path) -> RawSet:
    """Images without labels, at any depth."""
    paths = sorted(_find_images(path))
    if not paths:
        raise BadInput(f"{path} holds no images ({', '.join(SUFFIXES)}): {LAYOUT}")
    return RawSet(ImageFiles(paths), labels=None)


def _read_part(path: Path, classes: tuple[str, ...]) -> RawSet:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(_find_images(path / name))
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise BadInput(f"{path} holds no images of the classes {list(classes)}: {LAYOUT}")
    return RawSet(ImageFiles(paths), np.array(labels, dtype=np.int64))


def _class_names(path: Path) -> tuple[str, ...]:
    folders = (entry.name for entry in path.iterdir() if entry.is_dir() and not _is_hidden(entry))
    return tuple(sorted(name for name in folders if any(_find_images(path / name))))


def _find_images(folder: Path) -> Iterator[Path]:
    seen: set[str] = set()  # a link may lead back to a folder above
    for place, folders, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = [
            name
            for name in folders
            if not _is_hidden(Path(name))
            and os.path.realpath(os.path.join(place, name)) not in seen
        ]
        for name in files:
            if name.lower().endswith(SUFFIXES) and not _is_hidden(Path(name)):
                yield Path(place, name)


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name == "__MACOSX"


def _notes(path: Path | None, classes: tuple[str, ...], train: RawSet | None) -> Iterator[str]:
    if path is None or train is None or train.labels is None:
        return
    beside = [
        entry.name
        for entry in path.iterdir()
        if entry.is_file() and entry.suffix.lower() in SUFFIXES and not _is_hidden(entry)
    ]
    if beside:
        yield f"{len(beside)} images lie beside the class folders of {path} and are not used"
