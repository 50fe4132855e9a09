"""Which exit code an error leads to, what is said, and how a run is asked to stop."""

from __future__ import annotations

import errno
import signal

import pytest
import torch
import typer

from slimdown.cli.endings import exit_code_of, exit_codes, stopping_on_request
from slimdown.errors import (
    BadInput,
    CannotCapture,
    Diverged,
    Interrupted,
    MissingExtra,
    OutOfResources,
    RecipeError,
    Unsafe,
)

EXIT_CODES = [
    (RecipeError("x"), 2),
    (MissingExtra("openvino", "openvino"), 4),
    (BadInput("x"), 5),
    (CannotCapture("x"), 5),
    (Diverged("x"), 5),
    (Unsafe("x"), 6),
    (OutOfResources("x"), 7),
    (MemoryError(), 7),
    (torch.OutOfMemoryError("x"), 7),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 7),
    (OSError(errno.ENOSPC, "No space left on device"), 7),
    (OSError(errno.EROFS, "Read-only file system"), 7),
    (Interrupted("x"), 130),
    (KeyboardInterrupt(), 130),
]
BUGS = [ValueError("x"), RuntimeError("x"), KeyError("x"), OSError(errno.ENOENT, "x")]


@pytest.mark.parametrize(("error", "code"), EXIT_CODES, ids=lambda value: repr(value)[:30])
def test_each_error_has_its_exit_code(error: BaseException, code: int) -> None:
    assert exit_code_of(error) == code
    with pytest.raises(typer.Exit) as ended, exit_codes(debug=False):
        raise error
    assert ended.value.exit_code == code


@pytest.mark.parametrize("error", BUGS, ids=repr)
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    assert exit_code_of(error) is None
    with pytest.raises(type(error)), exit_codes(debug=False):
        raise error


def test_the_message_goes_to_stderr_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    message = "prune[1].macs [bold]is[/bold] " + "long " * 40
    with pytest.raises(typer.Exit), exit_codes(debug=False):
        raise RecipeError(message)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"error: {message}\n"


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), exit_codes(debug=True):
        raise RecipeError("x")
    assert "Traceback" in capsys.readouterr().err


def test_an_interruption_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (Interrupted(), KeyboardInterrupt()):
        with pytest.raises(typer.Exit), exit_codes(debug=False):
            raise error
        said = capsys.readouterr().err
        assert said.startswith("stopped: ")
        assert "run the same command again to go on" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_ends(
    number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with stopping_on_request() as stop_requested:
        assert not stop_requested()
        signal.raise_signal(number)
        assert stop_requested()
        assert "next clean point" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


def test_the_signals_are_given_back() -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with stopping_on_request():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
