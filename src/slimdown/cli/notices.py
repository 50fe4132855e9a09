"""Which warnings reach the user: ours, in plain words."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from slimdown.load import DataWarning


@contextmanager
def telling_notices(console: Console, *, debug: bool) -> Iterator[None]:
    """Print slimdown's own warnings as notes; those of its libraries are only for debugging."""
    if debug:
        yield
        return

    def tell(message: Warning | str, *rest: Any, **options: Any) -> None:
        console.print(f"note: {message}", markup=False, soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", DataWarning)
        warnings.showwarning = tell
        yield
