"""The global random number generators of torch, numpy and Python: seeded, kept and put back."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A seed of 32 bits that depends on every part, for streams that must not follow each other."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def seed_everything(seed: int) -> None:
    """Seed torch (every device), NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  the legacy generator is what tasks draw from unasked
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """The state of all global generators, as tensors and plain values."""
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": _plain(np.random.get_state(legacy=False)),  # noqa: NPY002
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def borrowed_randomness() -> Iterator[None]:
    """Let the body seed and use the global generators; afterwards they are as they were."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def _plain(value: Any) -> Any:
    """Arrays and their scalars as lists and numbers."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
