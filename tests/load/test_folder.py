from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slimdown.errors import BadInput
from slimdown.load import DataSource
from slimdown.load.folder import read_folder
from slimdown.load.raw import ImageFiles, RawData


def read(root: Path) -> RawData:
    return read_folder(DataSource(kind="folder", root=root))


def names(data: RawData) -> list[str]:
    assert data.train is not None
    assert isinstance(data.train.images, ImageFiles)
    return [f"{path.parent.name}/{path.name}" for path in data.train.images.paths]


def test_classes_are_the_sorted_folders(image_folder: Path) -> None:
    data = read(image_folder)
    assert data.classes == ("cat", "dog")
    assert data.train is not None
    np.testing.assert_array_equal(data.train.labels, [0] * 12 + [1] * 8)
    np.testing.assert_array_equal(data.test.labels, [0] * 5 + [1] * 5)
    assert names(data) == sorted(names(data))
    assert data.preprocess.size == (16, 16)
    assert data.flip


def test_judges_on_val_where_there_is_no_test(image_folder: Path) -> None:
    (image_folder / "test").rename(image_folder / "val")
    data = read(image_folder)
    assert len(data.test.images) == 10
    assert data.validation is None


def test_validates_on_val_where_there_is_a_test(image_folder: Path) -> None:
    shutil.copytree(image_folder / "train", image_folder / "val")
    data = read(image_folder)
    assert data.validation is not None
    assert (len(data.test.images), len(data.validation.images)) == (10, 20)


def test_takes_two_folders(image_folder: Path) -> None:
    source = DataSource(kind="folder", train=image_folder / "train", test=image_folder / "test")
    assert len(read_folder(source).test.images) == 10


def test_passes_over_what_is_no_image_and_finds_nested_ones(
    image_folder: Path, write_images: Callable[..., None]
) -> None:
    cats = image_folder / "train" / "cat"
    (cats / ".DS_Store").write_bytes(b"x")
    (cats / "._000.png").write_bytes(b"x")
    (cats / "Thumbs.db").write_bytes(b"x")
    (image_folder / "train" / "readme.txt").write_text("hello")
    (image_folder / "train" / "no images").mkdir()
    write_images(image_folder / "train" / "__MACOSX", 1)
    write_images(image_folder / "train" / ".cache", 1)
    write_images(cats / "more" / "still more", 2, suffix=".JPG")
    (cats / "loop").symlink_to(cats, target_is_directory=True)
    data = read(image_folder)
    assert data.classes == ("cat", "dog")
    assert data.train is not None
    assert len(data.train.images) == 22
    assert sum(name.startswith("still more/") for name in names(data)) == 2


def test_training_images_need_no_labels(image_folder: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for index, path in enumerate((image_folder / "train").rglob("*.png")):
        path.rename(flat / f"{index}.png")
    data = read_folder(DataSource(kind="folder", train=flat, test=image_folder / "test"))
    assert data.train is not None
    assert data.train.labels is None
    assert len(data.train.images) == 20


def test_nothing_is_judged_where_no_image_has_a_label(image_folder: Path, tmp_path: Path) -> None:
    data = read_folder(DataSource(kind="folder", train=image_folder / "train"))
    assert data.test is None
    assert data.train is not None
    assert data.train.labels is None
    assert len(data.train.images) == 20
    assert data.classes == ()
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="empty holds no images"):
        read_folder(DataSource(kind="folder", train=tmp_path / "empty"))


def test_tells_of_images_beside_the_class_folders(
    image_folder: Path, write_images: Callable[..., None]
) -> None:
    write_images(image_folder / "train", 3)
    assert "3 images lie beside the class folders" in read(image_folder).notes[0]


def test_images_are_upright(image_folder: Path) -> None:
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # held so that the camera's left is up
    path = image_folder / "train" / "cat" / "000.jpg"
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    upright = np.asarray(ImageFiles([path]).open(0))
    assert upright.shape == (16, 8, 3)
    assert upright[:6].min() > 200
    assert upright[10:].max() < 50


def test_opens_no_other_formats(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(OSError, match="cannot identify"):
        ImageFiles([tmp_path / "a.jpg"]).open(0)


# --------------------------------------------------------------------------------- bad input


def test_names_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no folder .*nowhere"):
        read(tmp_path / "nowhere")


def test_tells_the_layout_of_a_folder_without_parts(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"neither test/ nor val/ .*train/<class>"):
        read(tmp_path)


def test_refuses_empty_folders(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="empty holds no images"):
        read_folder(DataSource(kind="folder", train=tmp_path / "empty", test=image_folder / "test"))
    with pytest.raises(BadInput, match="empty holds no class folders"):
        read_folder(
            DataSource(kind="folder", train=image_folder / "train", test=tmp_path / "empty")
        )


def test_refuses_one_class(image_folder: Path) -> None:
    shutil.rmtree(image_folder / "train" / "dog")
    shutil.rmtree(image_folder / "test" / "dog")
    with pytest.raises(BadInput, match=r"at least two classes, found \['cat'\]"):
        read(image_folder)


def test_refuses_different_classes(image_folder: Path) -> None:
    os.rename(image_folder / "test" / "dog", image_folder / "test" / "hound")
    with pytest.raises(BadInput, match=r"first: \['dog'\], only in the second: \['hound'\]"):
        read(image_folder)


def test_refuses_a_class_without_training_images(image_folder: Path) -> None:
    for path in (image_folder / "train" / "dog").iterdir():
        path.unlink()
    with pytest.raises(BadInput, match=r"only in the second: \['dog'\]"):
        read(image_folder)
