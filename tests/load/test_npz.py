from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimdown.errors import BadInput, Unsafe
from slimdown.load import DataSource
from slimdown.load.npz import read_npz

WriteNpz = Callable[..., Path]


@pytest.fixture
def test_file(write_npz: WriteNpz) -> Path:
    return write_npz("test.npz", 9)


def test_reads_archives(write_npz: WriteNpz, test_file: Path) -> None:
    train = write_npz("train.npz", 30)
    for source in (
        DataSource(kind="npz", train=train, test=test_file),
        DataSource(kind="npz", root=train.parent),
    ):
        data = read_npz(source)
        assert data.train is not None
        assert (len(data.train.images), len(data.test.images)) == (30, 9)
        assert data.classes == ("0", "1", "2")
        with np.load(train) as arrays:
            np.testing.assert_array_equal(np.asarray(data.train.images.open(4)), arrays["X"][4])
        assert data.preprocess.channels == "RGB"


@pytest.mark.parametrize("shape", [(9, 16, 16), (9, 16, 16, 1)])
def test_reads_gray_images(write_npz: WriteNpz, noise: Any, shape: tuple[int, ...]) -> None:
    data = read_npz(DataSource(kind="npz", test=write_npz("gray.npz", 9, X=noise(*shape))))
    assert data.preprocess.channels == "L"
    assert data.test.images.open(0).mode == "L"


def test_training_images_need_no_labels(write_npz: WriteNpz, test_file: Path) -> None:
    train = write_npz("unlabeled.npz", Y=None)
    data = read_npz(DataSource(kind="npz", train=train, test=test_file))
    assert data.train is not None
    assert data.train.labels is None


def test_names_classes(write_npz: WriteNpz) -> None:
    path = write_npz("few.npz", 4, Y=np.array([0, 3, 0, 3]))
    source = DataSource(kind="npz", test=path, labels=("a", "b", "c", "d"))
    assert read_npz(source).classes == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": None}, "no array X"),
        ({"X": np.zeros((30, 16, 16, 3))}, "X must hold uint8 .* got float64 from 0 to 0"),
        ({"X": np.full((30, 16, 16, 3), np.nan)}, "got float64 with 23040 NaN or infinite"),
        ({"X": np.full((30, 16, 16, 3), "a")}, "got <U1"),
        ({"X": np.zeros((30, 16, 16, 3), np.int32)}, "got int32"),
        ({"X": np.zeros((30, 3, 16, 16), np.uint8)}, r"got \(30, 3, 16, 16\).*transpose"),
        ({"X": np.zeros((30, 16, 16, 4), np.uint8)}, r"got \(30, 16, 16, 4\)"),
        ({"X": np.zeros((30, 256), np.uint8)}, r"got \(30, 256\)"),
        ({"X": np.zeros((0, 16, 16, 3), np.uint8)}, "holds no images"),
        ({"Y": np.zeros(29, np.int64)}, "X has 30 images and Y has 29 labels"),
        ({"Y": np.zeros(30)}, "Y must hold integers"),
        ({"Y": np.zeros((30, 3), np.int64)}, "Y must hold integers"),
        ({"Y": None}, "has no Y"),
        ({"Y": np.zeros(30, np.int64)}, "at least two classes"),
        ({"Y": np.arange(30) % 3 - 1}, r"labels must be in 0\.\.1, got -1 for bad\.npz\[0\]"),
        ({"Y": np.arange(30) % 3 + 1}, r"no image has the class 0 of 0\.\.3"),
    ],
)
def test_refuses_arrays_that_are_no_images_with_labels(
    write_npz: WriteNpz, arrays: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        read_npz(DataSource(kind="npz", test=write_npz("bad.npz", **arrays)))


def test_refuses_labels_beyond_the_named_classes(write_npz: WriteNpz) -> None:
    with pytest.raises(BadInput, match=r"labels must be in 0\.\.1, got 2"):
        read_npz(DataSource(kind="npz", test=write_npz("a.npz"), labels=("a", "b")))


class Malicious:
    """Unpickling it writes a file."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return Path.write_text, (self.victim, "pwned")


def test_never_runs_the_code_of_a_pickle(write_npz: WriteNpz, tmp_path: Path) -> None:
    objects = np.array([Malicious(tmp_path / "victim")], dtype=object)
    path = write_npz("objects.npz", X=objects)
    with pytest.raises(Unsafe, match="Python objects"):
        read_npz(DataSource(kind="npz", test=path))
    assert not (tmp_path / "victim").exists()


def test_tells_damaged_archives(test_file: Path, tmp_path: Path) -> None:
    content = bytearray(test_file.read_bytes())
    content[200:260] = bytes(60)
    (tmp_path / "damaged.npz").write_bytes(content)
    with pytest.raises(BadInput, match="damaged"):
        read_npz(DataSource(kind="npz", test=tmp_path / "damaged.npz"))


def test_tells_what_is_no_archive_or_is_absent(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(BadInput, match=r"text\.npz is no \.npz archive"):
        read_npz(DataSource(kind="npz", test=tmp_path / "text.npz"))
    with pytest.raises(BadInput, match=r"no file .*nowhere\.npz"):
        read_npz(DataSource(kind="npz", test=tmp_path / "nowhere.npz"))
