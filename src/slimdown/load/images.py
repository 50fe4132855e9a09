"""Preprocessed pixels: in memory where they fit, decoded as they are needed where they do not."""

from __future__ import annotations

import hashlib
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from slimdown.core import Preprocess
from slimdown.errors import BadInput
from slimdown.load.preprocess import to_pixels
from slimdown.load.raw import RawImages

MAX_BROKEN_SHARE = 0.01
CHUNK = 256
NUM_LISTED = 10

Item = TypeVar("Item")
Result = TypeVar("Result")


class DataWarning(UserWarning):
    """Something about the data that the user should know."""


class Images(Protocol):
    """Preprocessed images by index."""

    @property
    def num_workers(self) -> int:
        """Threads that are worth running `load` on; 0 where it only reads memory."""
        ...

    def __len__(self) -> int: ...

    def load(self, indices: Sequence[int]) -> tuple[Tensor, list[int]]:
        """(n, C, H, W) uint8, and which of `indices` they are: broken images are left out."""
        ...

    def num_bytes(self, index: int) -> int: ...

    def content(self, index: int) -> bytes:
        """The bytes that two equal images share."""
        ...

    def fingerprint(self) -> str:
        """A hash that changes when the images do."""
        ...


@dataclass(frozen=True, eq=False)
class CachedImages:
    """Pixels in memory, (N, C, H, W) uint8."""

    pixels: Tensor
    num_workers: int = 0

    def __len__(self) -> int:
        return len(self.pixels)

    def load(self, indices: Sequence[int]) -> tuple[Tensor, list[int]]:
        return self.pixels[torch.as_tensor(indices, dtype=torch.int64)], list(indices)

    def num_bytes(self, index: int) -> int:
        return self.pixels[index].numel()

    def content(self, index: int) -> bytes:
        return self.pixels[index].numpy().tobytes()

    def fingerprint(self) -> str:
        shape = str(tuple(self.pixels.shape)).encode()
        digest = hashlib.sha256(shape)
        for start in range(0, len(self.pixels), CHUNK):
            digest.update(self.pixels[start : start + CHUNK].numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class StreamedImages:
    """Pixels decoded anew each time; an image that cannot be decoded is skipped and told once."""

    raw: RawImages
    preprocess: Preprocess
    num_workers: int
    broken: dict[str, str] = field(default_factory=dict)
    """Name -> reason, of those met so far."""

    def __len__(self) -> int:
        return len(self.raw)

    def load(self, indices: Sequence[int]) -> tuple[Tensor, list[int]]:
        kept, pixels = [], []
        for index in indices:
            decoded = _decode(self.raw, index, self.preprocess)
            if isinstance(decoded, str):
                self._leave_out(self.raw.name(index), decoded)
            else:
                kept.append(index)
                pixels.append(decoded)
        empty = np.empty((0, len(self.preprocess.mean), *self.preprocess.size), dtype=np.uint8)
        return torch.from_numpy(np.stack(pixels) if pixels else empty), kept

    def _leave_out(self, name: str, reason: str) -> None:
        if name not in self.broken:
            self.broken[name] = reason
            judge_broken(self.broken, len(self))
            warnings.warn(f"{name} cannot be read and is left out: {reason}", DataWarning)  # noqa: B028

    def num_bytes(self, index: int) -> int:
        return self.raw.num_bytes(index)

    def content(self, index: int) -> bytes:
        return self.raw.content(index)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for index in range(len(self.raw)):
            digest.update(f"{self.raw.stamp(index)}\n".encode())
        return digest.hexdigest()


def cache(
    raw: RawImages, preprocess: Preprocess, *, num_workers: int
) -> tuple[CachedImages, list[int], dict[str, str]]:
    """Decode all images; which of them could be, and name -> reason of those that could not."""
    channels, (height, width) = len(preprocess.mean), preprocess.size
    pixels = np.empty((len(raw), channels, height, width), dtype=np.uint8)

    def fill(chunk: range) -> dict[int, str]:
        broken = {}
        for index in chunk:
            decoded = _decode(raw, index, preprocess)
            if isinstance(decoded, str):
                broken[index] = decoded
            else:
                pixels[index] = decoded
        return broken

    chunks = [range(len(raw))[start : start + CHUNK] for start in range(0, len(raw), CHUNK)]
    broken: dict[int, str] = {}
    for found in map_ahead(fill, chunks, num_workers=num_workers):
        broken |= found
    kept = [index for index in range(len(raw)) if index not in broken]
    if broken:
        pixels = pixels[kept]
    reasons = {raw.name(index): reason for index, reason in broken.items()}
    return CachedImages(torch.from_numpy(pixels)), kept, reasons


def judge_broken(broken: Mapping[str, str], total: int) -> list[str]:
    """Note which of `total` images are left out, name -> reason; BadInput where it is over 1 %."""
    if not broken:
        return []
    listed = "".join(f"\n  {name}: {why}" for name, why in list(broken.items())[:NUM_LISTED])
    if len(broken) > NUM_LISTED:
        listed += f"\n  and {len(broken) - NUM_LISTED} more"
    figure = f"{len(broken)} of {total} images ({len(broken) / total:.2%}) cannot be read"
    if len(broken) > MAX_BROKEN_SHARE * total:
        allowed = f"{MAX_BROKEN_SHARE:.0%}"
        raise BadInput(f"{figure}; up to {allowed} would be left out. Mend or remove:{listed}")
    return [f"{figure} and are left out:{listed}"]


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_workers: int
) -> Iterator[Result]:
    """Map in order, on threads that work ahead by one item each; on none with 0 of them.

    Threads and not processes: Pillow lets go of the interpreter while it decodes and resizes, and
    nothing has to be forked, pickled or passed through shared memory.
    """
    if num_workers == 0:
        yield from map(function, items)
        return
    running: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(num_workers)
    try:
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > num_workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _decode(
    raw: RawImages, index: int, preprocess: Preprocess
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]] | str:
    """Pixels, or why there are none."""
    try:
        image = raw.open(index)
    except Exception as error:  # a decoder may raise anything, and it concerns this image alone
        return f"{type(error).__name__}: {error}"
    try:
        return to_pixels(image, preprocess)
    except BadInput as error:
        raise BadInput(f"{raw.name(index)}: {error}") from error
