"""How far a method has come, drawn on stderr: a bar a stage, with the time that it has taken and the time left.

In a terminal the bars are those of `rich`, in a notebook a line of text; elsewhere nothing is drawn. The time left is
that of the cells so far, times those that are left.

Check: what is drawn, where, and what is not; tests/laws/test_progress.py.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Task

PAUSE = 0.2
"""Seconds between two updates of a notebook's line."""


class Drawing(Protocol):
    """What draws progress."""

    def report(self, stage: str, done: int, everything: int) -> None:
        """Draw how far a stage has come."""
        ...

    def close(self) -> None:
        """Leave it as it is."""
        ...


def visible() -> bool:
    """Whether somebody sees what is drawn on stderr: a terminal, or a notebook."""
    return _in_notebook() or bool(getattr(sys.stderr, "isatty", lambda: False)())


def drawing(began: float) -> Drawing:
    """What draws progress here, of something that began at some time of `monotonic`."""
    if _in_notebook():
        return Line(began)
    from rich.console import Console

    return Bars(Console(stderr=True), began)


def _in_notebook() -> bool:
    ipython: Any = sys.modules.get("IPython")
    return ipython is not None and type(ipython.get_ipython()).__name__ == "ZMQInteractiveShell"


def in_words(elapsed: float, done: int, everything: int) -> str:
    """The time that some of the cells have taken, and the time left: "0:12, 1:04 left"."""
    words = _clock(elapsed)
    return f"{words}, {_clock(elapsed * (everything - done) / done)} left" if 0 < done < everything else words


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Bars:
    """Bars on a terminal; until a first stage is reported one without an end says that something runs."""

    def __init__(self, console: Console, began: float | None = None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
        from rich.text import Text

        class Times(ProgressColumn):
            max_refresh = None

            def render(self, task: Task) -> Text:
                """The time taken, and the time left."""
                until: float = task.fields["ended"] or monotonic()
                words = in_words(until - task.fields["began"], int(task.completed), int(task.total or 0))
                return Text(words, style="progress.remaining")

        columns = (TextColumn("{task.description:20}"), BarColumn(20), MofNCompleteColumn(), Times())
        self._bars = Progress(*columns, console=console)
        self._since = monotonic() if began is None else began
        self._stages: dict[str, Any] = {}
        self._waiting = [self._bars.add_task("running", total=None, began=self._since, ended=None)]
        self._bars.start()
        self._bars.refresh()

    def report(self, stage: str, done: int, everything: int) -> None:
        """Draw how far a stage has come."""
        if self._waiting:
            self._bars.remove_task(self._waiting.pop())
        if stage not in self._stages:
            self._stages[stage] = self._bars.add_task(stage, total=everything, began=self._since, ended=None)
        self._since = monotonic()  # the next stage begins when this one was last heard of
        ended = self._since if done >= everything else None
        self._bars.update(self._stages[stage], completed=done, total=everything, ended=ended)

    def close(self) -> None:
        """Leave the bars as they are."""
        self._bars.stop()


class Line:
    """A line under the cell of a notebook; none where IPython cannot show one."""

    def __init__(self, began: float) -> None:
        self._began, self._shown, self._stage, self._handle = began, 0.0, "", None

    def report(self, stage: str, done: int, everything: int) -> None:
        """Draw how far a stage has come."""
        now = monotonic()
        if stage != self._stage:
            self._stage, self._began = stage, self._shown or self._began
        elif done < everything and now - self._shown < PAUSE:
            return
        self._shown = now
        text = {"text/plain": f"{stage} {done:,}/{everything:,}  {in_words(now - self._began, done, everything)}"}
        with suppress(ImportError):
            from IPython.display import display  # pyright: ignore[reportMissingImports]

            if self._handle is None:
                self._handle: Any = display(text, raw=True, display_id=True)
            else:
                self._handle.update(text, raw=True)

    def close(self) -> None:
        """Leave the line as it is."""


class Later:
    """Draws from the first report on, so that what reports nothing draws nothing."""

    def __init__(self) -> None:
        self._began, self._drawing = monotonic(), None

    def report(self, stage: str, done: int, everything: int) -> None:
        """Draw how far a stage has come."""
        if self._drawing is None:
            self._drawing: Drawing | None = drawing(self._began)
        self._drawing.report(stage, done, everything)

    def close(self) -> None:
        """Leave what was drawn as it is."""
        if self._drawing is not None:
            self._drawing.close()
