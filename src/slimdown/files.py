"""How slimdown writes: whole files or none, and a clear word when the disk refuses."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from slimdown.errors import BadInput, OutOfResources

_REFUSALS = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EROFS: "the disk is read-only: choose another folder",
    errno.EACCES: "permission denied: choose another folder or mend its permissions",
    errno.EPERM: "not permitted: choose another folder or mend its permissions",
}


TEMPORARY = ".slimdown-"
"""How the names of half-written files begin; a kill leaves them behind."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a disk's refusal to write into OutOfResources; other errors pass unchanged."""
    try:
        yield
    except OSError as error:
        advice = _REFUSALS.get(error.errno or 0)
        if advice is None:
            raise
        raise OutOfResources(
            f"cannot write {path}: {advice}, then run again; what was written before is kept"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Lend a temporary file beside `path`; it takes `path`'s name, synced, if the body succeeds."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY, suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone. Raises BadInput where another process holds it.

    The lock ends with the process, however that ends. Windows has no such lock and goes without.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInput(
                f"another run is writing to {folder}: wait for its end, or choose another folder"
            ) from error
        yield


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed process left half written in `folder`."""
    for path in folder.glob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or nothing. Raises OutOfResources where the disk refuses."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 over the contents of files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    # The rename itself is durable only once its folder is; Windows cannot open folders.
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
