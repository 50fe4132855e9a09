"""How a command ends: exit codes as `slimdown.errors` lays them down, and Ctrl-C in two steps."""

from __future__ import annotations

import errno
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import typer
from rich.console import Console

from slimdown.errors import Interrupted, OutOfResources, SlimdownError

_DISK_REFUSES = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOMEM}
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STOPPING = b"\nStopping at the next clean point; once more ends at once.\n"


@contextmanager
def exit_codes(*, debug: bool) -> Iterator[None]:
    """Tell an error that the user can mend in a message and an exit code; let bugs through."""
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        code = exit_code_of(error)
        if code is None:
            raise
        if debug:
            traceback.print_exc()
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print("error:" if code != 130 else "stopped:", style="bold red", end=" ")
        console.print(_describe(error), markup=False)
        raise typer.Exit(code) from error


def exit_code_of(error: BaseException) -> int | None:
    """The exit code of an error, or None for what is a bug of ours."""
    if isinstance(error, SlimdownError | Interrupted):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.exit_code
    if _is_out_of_memory(error) or (isinstance(error, OSError) and error.errno in _DISK_REFUSES):
        return OutOfResources.exit_code
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    # On the CPU, torch has no class of its own for it.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _describe(error: BaseException) -> str:
    if isinstance(error, Interrupted):
        return f"{error}" or "run the same command again to go on"
    if isinstance(error, KeyboardInterrupt):
        return "ended at once; whole steps are kept: run the same command again to go on from there"
    if _is_out_of_memory(error):
        return f"out of memory: use smaller batches or images, or a larger machine ({error})"
    return str(error)


@contextmanager
def stopping_on_request() -> Iterator[Callable[[], bool]]:
    """Lend a question that turns true at the first Ctrl-C or SIGTERM; the second ends at once."""
    is_asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal is_asked
        is_asked = True
        for each in _STOP_SIGNALS:
            signal.signal(each, signal.default_int_handler)
        # Not print: it may be what the signal interrupts.
        os.write(2, _STOPPING)

    before = {each: signal.signal(each, ask) for each in _STOP_SIGNALS}
    try:
        yield lambda: is_asked
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
