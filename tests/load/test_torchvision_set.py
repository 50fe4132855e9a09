from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision import datasets

from slimdown.errors import BadInput, RecipeError
from slimdown.load import DataSource
from slimdown.load.raw import RawData
from slimdown.load.torchvision_set import read_torchvision


def read(root: Path, name: str) -> RawData:
    return read_torchvision(DataSource(kind="torchvision", root=root, name=name))


@pytest.fixture
def fashion(tmp_path: Path, noise: Callable[..., Any]) -> Path:
    """Fashion-MNIST in its own format, but small."""
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        images = noise(count, 28, 28)
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = struct.pack(">4i", 0x803, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">2i", 0x801, count)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return tmp_path


def test_reads_fashion_mnist(fashion: Path) -> None:
    data = read(fashion, "FashionMNIST")
    assert data.train is not None
    assert (len(data.train.images), len(data.test.images)) == (40, 20)
    assert data.classes[:2] == ("T-shirt/top", "Trouser")
    assert data.preprocess.size == (28, 28)
    assert data.preprocess.channels == "L"
    assert data.flip
    expected = datasets.FashionMNIST(fashion, train=False)
    for index in (0, 7):
        image, label = expected[index]
        np.testing.assert_array_equal(data.test.images.open(index), image)
        assert data.test.labels is not None
        assert data.test.labels[index] == label


def test_characters_are_not_mirrored(fashion: Path) -> None:
    (fashion / "FashionMNIST").rename(fashion / "MNIST")
    assert not read(fashion, "MNIST").flip


def test_reads_sets_that_call_their_parts_splits(
    tmp_path: Path, write_images: Callable[..., None]
) -> None:
    for part in ("train", "test"):
        for name in ("AnnualCrop", "Forest"):
            write_images(tmp_path / "photos" / part / name, 3)
    assert_reads_splits(tmp_path / "photos", ["train", "test"])


def test_judges_on_val_where_a_set_has_no_test(
    tmp_path: Path, write_images: Callable[..., None]
) -> None:
    for part in ("train", "val"):
        for name in ("AnnualCrop", "Forest"):
            write_images(tmp_path / "photos" / part / name, 3)
    assert_reads_splits(tmp_path / "photos", ["train", "val"])


def assert_reads_splits(root: Path, splits: list[str]) -> None:
    class Photos(datasets.ImageFolder):  # type: ignore[misc]
        def __init__(self, root: Path, split: str = "train") -> None:
            if split not in splits:
                raise ValueError(f"Unknown value {split!r} for argument split.")
            super().__init__(root / split)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "Photos", Photos, raising=False)
        patch.setattr(datasets, "__all__", (*datasets.__all__, "Photos"))
        data = read(root, "Photos")
    assert data.classes == ("AnnualCrop", "Forest")
    np.testing.assert_array_equal(data.test.labels, [0, 0, 0, 1, 1, 1])
    assert data.test.images.name(0).endswith("000.png")


def test_reads_sets_that_list_their_files(
    tmp_path: Path, write_images: Callable[..., None]
) -> None:
    write_images(tmp_path, 6)

    class Signs:
        def __init__(self, root: Path, train: bool) -> None:
            self._samples = [(str(path), int(path.stem) % 3) for path in sorted(root.iterdir())]

        def __len__(self) -> int:
            return len(self._samples)

        def __getitem__(self, index: int) -> Any:
            raise AssertionError("need not be decoded to be listed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "Signs", Signs, raising=False)
        patch.setattr(datasets, "__all__", (*datasets.__all__, "Signs"))
        data = read(tmp_path, "Signs")
    assert data.classes == ("0", "1", "2")
    np.testing.assert_array_equal(data.test.labels, [0, 1, 2, 0, 1, 2])
    assert data.preprocess.size == (16, 16)


def test_refuses_sets_that_do_not_give_one_class(tmp_path: Path) -> None:
    class Boxes:
        targets = np.zeros((3, 4))

        def __init__(self, root: Path, train: bool) -> None:
            pass

        def __len__(self) -> int:
            return 3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "Boxes", Boxes, raising=False)
        patch.setattr(datasets, "__all__", (*datasets.__all__, "Boxes"))
        with pytest.raises(BadInput, match="does not give each image one class"):
            read(tmp_path, "Boxes")


def test_fetches_nothing(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"CIFAR10 is not whole in .*download=True\) does"):
        read(tmp_path, "CIFAR10")
    assert not list(tmp_path.iterdir())


def test_names_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no folder .*nowhere"):
        read(tmp_path / "nowhere", "CIFAR10")


def test_suggests_a_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'CIFAR1"):
        read(tmp_path, "cifar-10")


@pytest.mark.parametrize("name", ["FakeData", "EMNIST", "VOCDetection"])
def test_refuses_sets_without_parts_of_their_own(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=f"torchvision's {name}"):
        read(tmp_path, name)
