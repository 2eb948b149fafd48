"""Progress and tables: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_WIDTH = 100


def make_console(*, stderr: bool = False) -> Console:
    """A console; where the output is no terminal, lines are at most PLAIN_WIDTH wide."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, highlight=False, width=None if stream.isatty() else PLAIN_WIDTH)


class Phases:
    """Progress of named phases on stderr. Call it with (phase, done, total) as often as you like."""

    def __init__(self) -> None:
        console = make_console(stderr=True)
        self._console = console
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, float] = {}
        self._drawn = 0.0
        self._bars: Progress | None = None
        if console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TimeRemainingColumn(), console=console, refresh_per_second=5,
            )  # fmt: skip

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        began = self._began.setdefault(phase, now)
        if self._bars is None:
            if done >= total:
                self._console.print(f"{phase}: {done:,} in {now - began:.1f} s", soft_wrap=True)
            return
        # Whoever reports is often on the measured path: bars are drawn ten times a second at most.
        if done < total and now - self._drawn < 0.1:
            return
        self._drawn = now
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase, total=total)
        self._bars.update(self._tasks[phase], completed=done, total=total)
