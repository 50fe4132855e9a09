"""NumPy archives: X, uint8 images, and Y, their labels."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slimdown.errors import BadInput, Unsafe
from slimdown.load.preprocess import default_preprocess
from slimdown.load.raw import ImageArray, Labels, RawData, RawSet, probe
from slimdown.load.source import DataSource


def read_npz(source: DataSource) -> RawData:
    """Read .npz archives. Raises BadInput for arrays that cannot be used, Unsafe for pickles."""
    train_path, test_path = source.train, source.test
    if source.root is not None:
        own = source.root / "train.npz"
        train_path, test_path = own if own.is_file() else None, source.root / "test.npz"
    assert test_path is not None
    train = None if train_path is None else _read_part(train_path)
    test = _read_part(test_path)
    if test.labels is None:
        raise BadInput(f"{test_path} has no Y: test images need labels to be judged by")
    trained = None if train is None else train.labels
    labels = test.labels if trained is None else np.concatenate([trained, test.labels])
    images = (train or test).images
    assert isinstance(images, ImageArray)
    gray = images.pixels.ndim == 3
    return RawData(
        train=train,
        test=test,
        classes=source.labels or _count_classes(labels, test_path),
        preprocess=default_preprocess(probe(images), gray=gray),
    )


def _read_part(path: Path) -> RawSet:
    if not path.is_file():
        raise BadInput(f"there is no file {path}")
    arrays = _read_arrays(path)
    images = ImageArray(_check_images(arrays["X"], path), path.name)
    if "Y" not in arrays:
        return RawSet(images, labels=None)
    labels = _check_labels(arrays["Y"], path)
    if len(labels) != len(images):
        raise BadInput(f"{path}: X has {len(images)} images and Y has {len(labels)} labels")
    return RawSet(images, labels)


def _read_arrays(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    """X, and Y where there is one."""
    if not zipfile.is_zipfile(path):
        raise BadInput(f"{path} is no .npz archive: write it with np.savez(path, X=..., Y=...)")
    try:
        with np.load(path, allow_pickle=False) as archive:
            if "X" not in archive:
                raise BadInput(f"{path} has no array X of images, only {archive.files}")
            return {name: archive[name] for name in ("X", "Y") if name in archive}
    except BadInput:
        raise
    except ValueError as error:
        if "pickle" not in str(error):
            raise BadInput(f"{path} is damaged: {error}") from error
        raise Unsafe(
            f"refused to read {path}: it holds Python objects, and unpickling them can run any "
            "code. Save plain arrays: X of type uint8, Y of integers"
        ) from error
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise BadInput(f"{path} is damaged: {error}") from error


def _check_images(images: npt.NDArray[np.generic], path: Path) -> npt.NDArray[np.uint8]:
    """(N, H, W) or (N, H, W, 3), uint8, with a single channel dropped."""
    if images.dtype != np.uint8:
        raise BadInput(
            f"{path}: X must hold uint8 pixels of 0..255, got {_describe(images)}; undo its "
            "normalization, then np.round(pixels).astype(np.uint8)"
        )
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    is_color = images.ndim == 4 and images.shape[-1] == 3
    if not (is_color or images.ndim == 3):
        hint = ""
        if images.ndim == 4 and images.shape[1] in (1, 3):
            hint = "; channels come last: X.transpose(0, 2, 3, 1)"
        raise BadInput(
            f"{path}: X must be (N, H, W, 3), (N, H, W, 1) or (N, H, W), got {images.shape}{hint}"
        )
    if images.size == 0:
        raise BadInput(f"{path}: X holds no images, its shape is {images.shape}")
    return images  # type: ignore[return-value]


def _describe(images: npt.NDArray[np.generic]) -> str:
    """The type, the range of numbers, and how many are none."""
    if not np.issubdtype(images.dtype, np.number) or np.iscomplexobj(images):
        return str(images.dtype)
    finite = images[np.isfinite(images)]
    ends = f" from {finite.min():g} to {finite.max():g}" if finite.size else ""
    num_others = images.size - finite.size
    return f"{images.dtype}{ends}" + (f" with {num_others} NaN or infinite" if num_others else "")


def _check_labels(labels: npt.NDArray[np.generic], path: Path) -> Labels:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise BadInput(
            f"{path}: Y must hold integers, (N,), the class of each image counted from 0, "
            f"got {labels.dtype} {labels.shape}"
        )
    return labels.astype(np.int64)


def _count_classes(labels: Labels, path: Path) -> tuple[str, ...]:
    """Classes 0 to the largest label; a class that never occurs is more likely a mistake."""
    absent = sorted(set(range(int(labels.max()) + 1)) - set(labels.tolist()))
    if absent:
        raise BadInput(
            f"{path}: labels count from 0, but no image has the class "
            f"{', '.join(map(str, absent[:5]))} of 0..{labels.max()}; "
            "where that is meant, name all classes in data.labels"
        )
    return tuple(str(label) for label in range(int(labels.max()) + 1))
