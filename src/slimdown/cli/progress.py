"""How far a run has come: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from slimdown.core import Progress

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def showing_progress(console: Console) -> Iterator[Callable[[Progress], None]]:
    """Lend what a run calls with its progress."""
    if not console.is_terminal:
        yield show_in_lines(console)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", style="dim", markup=False),
    )
    with Bars(*columns, console=console) as bars:
        yield show_in_bars(bars)


def show_in_bars(bars: Bars) -> Callable[[Progress], None]:
    """One bar for each stretch of work; "prune: choose" and "prune: verify" are of one stretch."""
    work: str | None = None
    bar = TaskID(0)

    def show(progress: Progress) -> None:
        nonlocal work, bar
        stretch = progress.label.partition(":")[0]
        if stretch != work or bars.tasks[bar].finished:
            if work is not None:
                bars.stop_task(bar)
            work, bar = stretch, bars.add_task(progress.label, total=progress.total, figures="")
        bars.update(
            bar,
            description=progress.label,
            completed=progress.done,
            total=progress.total,
            figures=describe_figures(progress.figures),
        )

    return show


def show_in_lines(
    console: Console, *, clock: Callable[[], float] = time.monotonic
) -> Callable[[Progress], None]:
    """A line when a label begins and ends, and every ten seconds between, with the time left."""
    label: str | None = None
    first = Progress("", 0, 0)
    began = printed = 0.0

    def show(progress: Progress) -> None:
        nonlocal label, first, began, printed
        now = clock()
        is_new = progress.label != label
        if is_new:
            label, first, began = progress.label, progress, now
        if not is_new and progress.done < progress.total and now - printed < SECONDS_BETWEEN_LINES:
            return
        printed = now
        line = f"{progress.label}  {progress.done}/{progress.total}"
        steps = progress.done - first.done
        if steps > 0 and progress.done < progress.total:
            left = (now - began) / steps * (progress.total - progress.done)
            line += f"  {left:.0f} s left"
        line = f"{line}  {describe_figures(progress.figures)}".rstrip()
        console.print(line, markup=False, soft_wrap=True)

    return show


def describe_figures(figures: Mapping[str, float]) -> str:
    """`loss 0.4312  score 91.5`."""
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
