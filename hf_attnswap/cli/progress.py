"""Show the bar of a whole run: what is done, how long it took, and about how long the rest takes."""

import sys
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from ..evaluation.course import Progress

SELDOM_S = 10.0  # between two lines where nobody sees a bar


class RunBar:
    """Show every `Progress` with which the bar is called: a bar on a terminal, seldom lines in a pipe or a file."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self.started = self.said = time.monotonic()
        self.first: float | None = None
        self.bars: Bars | None = None
        if console.is_terminal:
            columns = (
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            # Steps may take a minute each: the rest is estimated from the last ten.
            self.bars = Bars(
                TextColumn("{task.description}", markup=False), *columns, console=console, speed_estimate_period=600
            )
            self.task = self.bars.add_task("loading the model", total=None)

    def __enter__(self) -> "RunBar":
        if self.bars:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars:
            self.bars.stop()

    def __call__(self, progress: Progress) -> None:
        if not progress.total:
            self._say(progress.line, "before the first arm")
            return
        if self.first is None:
            self.first, self.started = progress.done, time.monotonic()  # an earlier run did what is done by now
            if self.bars:
                self.bars.reset(self.task, total=progress.total, completed=progress.done)
        if self.bars:
            self.bars.update(self.task, completed=progress.done)
        self._say(progress.line, self._where(progress))

    def _say(self, line: str, where: str) -> None:
        if self.bars:
            self.bars.update(self.task, description=line[:40])
        elif time.monotonic() - self.said >= SELDOM_S or line == "starting":
            self.said = time.monotonic()
            print(f"[{where}] {line}", file=sys.stderr, flush=True)

    def _where(self, progress: Progress) -> str:
        """Return how far the run is: "35 %, 0:02:10, about 0:04:00 left"."""
        took, own = time.monotonic() - self.started, progress.done - (self.first or 0)
        said = f"{100 * progress.done / progress.total:.0f} %, {timedelta(seconds=round(took))}"
        left = took * (progress.total - progress.done) / own if own > 0 else None
        return said if left is None else f"{said}, about {timedelta(seconds=round(left))} left"
