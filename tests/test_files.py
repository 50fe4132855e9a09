"""Whole files or none, and a clear word when the disk refuses."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from slimdown.errors import BadInput, OutOfResources
from slimdown.files import disk_errors, hash_files, locked, replacing, write_bytes


def test_write_bytes_makes_folders_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a" / "b.txt", b"content")
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"content"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_bytes(path, b"old")

    def fail_half_way() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"ne")
            raise RuntimeError("the power went")

    with pytest.raises(RuntimeError, match="the power went"):
        fail_half_way()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("code", "advice"),
    [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "permission")],
)
def test_a_refusing_disk_is_told_plainly(tmp_path: Path, code: int, advice: str) -> None:
    with pytest.raises(OutOfResources, match=advice), disk_errors(tmp_path / "x"):
        raise OSError(code, os.strerror(code))


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path / "x"):
        raise FileNotFoundError(errno.ENOENT, "no such file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device_is_told() -> None:
    with (
        pytest.raises(OutOfResources, match="disk is full"),
        disk_errors(Path("/dev/full")),
        Path("/dev/full").open("wb", buffering=0) as file,
    ):
        file.write(b"x")


def test_hash_is_over_contents_in_order(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    first.write_bytes(b"one")
    second.write_bytes(b"two")
    assert hash_files([first, second]) == hashlib.sha256(b"onetwo").hexdigest()
    assert hash_files([second, first]) != hash_files([first, second])


@pytest.mark.skipif(os.name != "posix", reason="needs flock")
def test_a_folder_is_one_runs_at_a_time(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "run"),
        pytest.raises(BadInput, match="another run is writing"),
        locked(tmp_path / "run"),
    ):
        raise AssertionError("two runs hold the folder")
    with locked(tmp_path / "run"):
        pass
