"""Progress of long steps: a bar on a terminal, plain lines with elapsed time elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_LINE_INTERVAL_S = 5.0


class Task:
    """One step in progress."""

    def __init__(self, owner: Progress, description: str, total: int | None) -> None:
        self.description = description
        self.total = total
        self.done = 0
        self._owner = owner
        self._started = time.monotonic()
        self._last_line = self._started
        self._bar_id = owner.add_bar(description, total)

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count finished units; `note` replaces the text behind the description."""
        self.done += n
        text = f"{self.description}: {note}" if note else self.description
        self._owner.update_bar(self._bar_id, text, self.done)
        if time.monotonic() - self._last_line >= _LINE_INTERVAL_S:
            self._last_line = time.monotonic()
            self._owner.line(f"  {text}  {self._fraction()}  {self._last_line - self._started:.0f} s")

    def _fraction(self) -> str:
        return f"{self.done}/{self.total}" if self.total else str(self.done)


class Progress:
    """Where progress goes.

    Args:
        quiet: show nothing.
        stream: where lines and bars go; standard error by default, so that tables on standard output stay clean.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._quiet = quiet
        self._stream = stream or sys.stderr
        self._live: RichProgress | None = None

    @contextlib.contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        """Show one step while the block runs; a plain line says when it ends, or that it failed."""
        outermost = self._live is None and not self._quiet and self._stream.isatty()
        if outermost:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._live = RichProgress(*columns, console=Console(file=self._stream), transient=True)
            self._live.start()
        started = time.monotonic()
        task = Task(self, description, total)
        try:
            yield task
        finally:
            if outermost and self._live is not None:
                self._live.stop()
                self._live = None
            if (seconds := time.monotonic() - started) >= _LINE_INTERVAL_S:
                self.line(f"  {description}: {task.done} in {seconds:.0f} s")

    def say(self, text: str) -> None:
        """Print one line."""
        if not self._quiet:
            print(text, file=self._stream, flush=True)

    def line(self, text: str) -> None:
        """Print one line of progress where there is no bar."""
        if self._live is None:
            self.say(text)

    def add_bar(self, description: str, total: int | None) -> int | None:
        """Add a bar on a terminal."""
        return None if self._live is None else int(self._live.add_task(description, total=total))

    def update_bar(self, bar_id: int | None, description: str, done: int) -> None:
        """Move a bar on a terminal."""
        if self._live is not None and bar_id is not None:
            for task in self._live.tasks:
                if int(task.id) == bar_id:
                    self._live.update(task.id, description=description, completed=done)
