"""The data sets of torchvision that are on disk; nothing is fetched."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimdown.errors import BadInput, RecipeError
from slimdown.load.preprocess import default_preprocess, is_gray
from slimdown.load.raw import ImageDataset, ImageFiles, Labels, RawData, RawImages, RawSet, probe
from slimdown.load.source import DataSource
from slimdown.suggest import did_you_mean

NOT_MIRRORED = ("MNIST", "KMNIST", "QMNIST", "USPS", "SVHN", "GTSRB", "Omniglot", "RenderedSST2")
"""Characters, signs and text: their mirror images are not of the same class."""


def read_torchvision(source: DataSource) -> RawData:
    """Read a classification set of torchvision.datasets from `root`.

    Raises RecipeError for a name that torchvision does not know or that has no training and test
    split of its own, and BadInput where the files are not in `root`.
    """
    assert source.root is not None
    assert source.name is not None
    train = _open(source.name, source.root, train=True)
    test = _open(source.name, source.root, train=False)
    train_images = _images(train, f"{source.name} train")
    probed = probe(train_images)
    return RawData(
        train=RawSet(train_images, _labels(train)),
        test=RawSet(_images(test, f"{source.name} test"), _labels(test)),
        classes=_classes(train),
        preprocess=default_preprocess(
            probed, gray=bool(probed) and all(is_gray(image) for image in probed)
        ),
        flip=source.name not in NOT_MIRRORED,
    )


def _open(name: str, root: Path, *, train: bool) -> Any:
    from torchvision import datasets

    if name not in datasets.__all__:
        raise RecipeError(
            f"torchvision has no data set {name!r}{did_you_mean(name, datasets.__all__)}"
        )
    if not root.is_dir():
        raise BadInput(f"there is no folder {root} for torchvision's {name}")
    make = getattr(datasets, name)
    parameters = inspect.signature(make).parameters
    fixed = {"download": False} if "download" in parameters else {}
    if "train" in parameters:
        return _make(make, root, [{"train": train, **fixed}])
    if "split" in parameters:
        names = ["train"] if train else ["test", "val"]
        return _make(make, root, [{"split": split, **fixed} for split in names])
    raise RecipeError(
        f"torchvision's {name} has no training and test split of its own: give an image folder "
        "(data.kind: folder) or an archive (data.kind: npz)"
    )


def _make(make: Any, root: Path, ways: Sequence[dict[str, Any]]) -> Any:
    """Make the data set in the first of the ways that it knows."""
    name = make.__name__
    try:
        return make(root, **ways[0])
    except (RuntimeError, OSError, EOFError) as error:
        raise BadInput(
            f"torchvision's {name} is not whole in {root}: {error}. slimdown fetches no data; "
            f"torchvision.datasets.{name}(root, download=True) does"
        ) from error
    except (TypeError, ValueError) as error:
        if len(ways) > 1:
            return _make(make, root, ways[1:])
        raise RecipeError(f"torchvision's {name} cannot be read by name alone: {error}") from error


def _images(dataset: Any, origin: str) -> RawImages:
    files = _files(dataset)
    if files is None:
        return ImageDataset(dataset, origin)
    return ImageFiles([Path(entry[0] if isinstance(entry, tuple) else entry) for entry in files])


def _files(dataset: Any) -> Sequence[Any] | None:
    """Paths, or pairs of path and label, of a set that is a folder of images."""
    for attribute in ("samples", "_samples", "_image_files"):
        files: Sequence[Any] | None = getattr(dataset, attribute, None)
        if files is not None:
            return files
    return None


def _labels(dataset: Any) -> Labels:
    files = _files(dataset)
    for attribute in ("targets", "labels", "_labels"):
        found = getattr(dataset, attribute, None)
        if found is not None:
            break
    else:
        pairs = files if files and isinstance(files[0], tuple) else dataset
        found = [pairs[index][1] for index in range(len(pairs))]
    labels = np.asarray(found)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise BadInput(
            f"torchvision's {type(dataset).__name__} does not give each image one class: its "
            f"targets are {labels.dtype} {labels.shape}"
        )
    return labels.astype(np.int64)


def _classes(dataset: Any) -> tuple[str, ...]:
    names = getattr(dataset, "classes", None)
    if names is not None:
        return tuple(name if isinstance(name, str) else name[0] for name in names)
    return tuple(str(label) for label in range(int(_labels(dataset).max()) + 1))
