"""Progress as bars on a terminal, as plain lines elsewhere."""

from __future__ import annotations

import io

from rich.console import Console

from slimdown.cli.progress import describe_figures, show_in_lines, showing_progress
from slimdown.core import Progress


def test_plain_lines_are_few_and_tell_the_time_left() -> None:
    stream = io.StringIO()
    now = 0.0
    show = show_in_lines(Console(file=stream, width=100), clock=lambda: now)
    for done in range(101):
        show(Progress("distill", done, 100, {"loss": 0.123456, "epoch": 1}))
        now += 0.5
    show(Progress("measure [1]", 0, 1))
    assert stream.getvalue().splitlines() == [
        "distill  0/100  loss 0.1235  epoch 1",
        "distill  20/100  40 s left  loss 0.1235  epoch 1",
        "distill  40/100  30 s left  loss 0.1235  epoch 1",
        "distill  60/100  20 s left  loss 0.1235  epoch 1",
        "distill  80/100  10 s left  loss 0.1235  epoch 1",
        "distill  100/100  loss 0.1235  epoch 1",
        "measure [1]  0/1",
    ]


def test_a_resumed_step_counts_its_own_time_only() -> None:
    stream = io.StringIO()
    now = 0.0
    show = show_in_lines(Console(file=stream, width=100), clock=lambda: now)
    show(Progress("distill", 50, 100))
    now = 10.0
    show(Progress("distill", 60, 100))
    assert stream.getvalue().splitlines()[1] == "distill  60/100  40 s left"


def test_bars_on_a_terminal() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=120, force_terminal=True, color_system=None)
    with showing_progress(console) as show:
        show(Progress("distill", 1, 2, {"loss": 0.5}))
        show(Progress("distill", 2, 2, {"loss": 0.25}))
        show(Progress("distill", 1, 4))  # a second stage of the kind
        show(Progress("prune: choose", 1, 3))
        show(Progress("prune: verify", 2, 3))
        show(Progress("measure", 0, 1))
    lines = stream.getvalue()
    assert "2/2" in lines
    assert "1/4" in lines
    assert "loss 0.25" in lines
    assert "prune: verify" in lines
    # The last picture: one bar each for two distillations, the pruning and the measuring.
    last = lines.splitlines()[-5:-1]
    labels = ["distill", "distill", "prune: verify", "measure"]
    assert all(label in line for label, line in zip(labels, last, strict=True))


def test_a_pipe_gets_no_bars() -> None:
    stream = io.StringIO()
    with showing_progress(Console(file=stream, width=100)) as show:
        show(Progress("distill", 1, 2))
    assert stream.getvalue() == "distill  1/2\n"


def test_figures_are_short() -> None:
    assert describe_figures({"loss": 0.43219, "rate": 1e-05}) == "loss 0.4322  rate 1e-05"
    assert describe_figures({}) == ""
