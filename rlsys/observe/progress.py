"""One view of a running training: live in a terminal, plain lines anywhere else.

All writing is done by a thread of its own. A terminal that is stopped (Ctrl-S), slow, narrow, colourless or gone costs
the run nothing: callers only leave their news and go on.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TextIO

from rlsys.observe.progress_view import Shown, as_line, as_panel
from rlsys.records import START, Version

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

REFRESH_S = 0.25  # between two drawings of the live view
LINE_EVERY_S = 10.0  # plain lines: at least one so often while there is news
EVENTS_SHOWN = 6
LINES_HELD = 1000  # plain lines waiting for a stream that does not take them; beyond that the oldest go
CLOSE_S = 5.0  # what the end of the run waits for its last words


class Progress:
    """Shows steps, state and events on ``stream``: a live panel where that is a terminal, else lines."""

    def __init__(
        self, stream: TextIO, total_steps: int, version: Version = START, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream, self._clock = stream, clock
        self._began = self._last_line = clock()
        self._shown = Shown(step=version.step, total_steps=total_steps, version=str(version), elapsed_s=0.0)
        self._lines: deque[str] = deque(maxlen=LINES_HELD)
        self._summary = ""
        self._news = threading.Event()
        self._closing = threading.Event()
        self._live = _open_live(stream)
        self._thread = threading.Thread(target=self._write_all, name="progress", daemon=True)
        self._thread.start()

    def live(self, values: Mapping[str, float]) -> None:
        """Take over present values, by metric name. Others stay as they were."""
        self._update(values=values)
        if self._clock() - self._last_line >= LINE_EVERY_S:
            self._say(as_line(self._shown))

    def step(self, step: int, version: Version, metrics: Mapping[str, float]) -> None:
        """One more batch is trained."""
        self._shown = replace(self._shown, step=step, version=str(version))
        self._update(values=metrics)
        self._say(as_line(self._shown))

    def event(self, text: str) -> None:
        """One sentence for the person who watches."""
        self._shown = replace(self._shown, events=(*self._shown.events, text)[-EVENTS_SHOWN:])
        self._update(values={})
        self._say(text)

    def close(self, summary: str = "") -> None:
        """Leave the last state and ``summary`` on the stream. Waits ``CLOSE_S`` at most."""
        self._update(values={})
        self._summary = summary
        self._closing.set()
        self._news.set()
        self._thread.join(CLOSE_S)

    def _update(self, values: Mapping[str, float]) -> None:
        # The record is replaced, never changed: the writing thread sees the old one or the new one, whole.
        self._shown = replace(
            self._shown, values={**self._shown.values, **values}, elapsed_s=self._clock() - self._began
        )

    def _say(self, line: str) -> None:
        """Plain lines only: the live view shows the same in its place."""
        self._last_line = self._clock()
        if self._live is None:
            self._lines.append(line)
            self._news.set()

    def _write_all(self) -> None:
        try:
            if self._live is None:
                self._write_lines()
            else:
                self._draw(self._live)
        except (OSError, ValueError):  # the terminal is gone, or its stream closed: from here on, silence
            return

    def _write_lines(self) -> None:
        closing = False
        while not closing:
            self._news.wait()
            self._news.clear()
            closing = self._closing.is_set()
            while self._lines:
                self._stream.write(self._lines.popleft() + "\n")
            if closing and self._summary:
                self._stream.write(self._summary + "\n")
            self._stream.flush()

    def _draw(self, live: Live) -> None:
        with live:
            while not self._closing.wait(REFRESH_S):
                _fit(live.console, self._stream)
                live.update(as_panel(self._shown), refresh=True)
            live.update(as_panel(self._shown), refresh=True)
        if self._summary:
            self._stream.write(self._summary + "\n")
        self._stream.flush()


def _open_live(stream: TextIO) -> Live | None:
    """The live view, or None where the stream is no terminal that can move its cursor."""
    if not stream.isatty():
        return None
    from rich.console import Console
    from rich.live import Live

    console = Console(file=stream)
    if console.is_dumb_terminal:
        return None
    # Standard output and error lead into the log by now: rich must leave them alone.
    return Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)


def _fit(console: Console, stream: TextIO) -> None:
    """Follow the size of the terminal; rich would ask standard output for it, which is no terminal any more."""
    from rich.console import ConsoleDimensions

    columns, lines = os.get_terminal_size(stream.fileno())
    if columns and lines:  # 0: a terminal that does not know its size
        console.size = ConsoleDimensions(columns, lines)
