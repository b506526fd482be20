"""The progress view: what it says, and that no terminal can hurt the run."""

import fcntl
import io
import os
import re
import struct
import termios
import threading
import time

import pytest

from rlsys.observe import progress as progress_module
from rlsys.observe.progress import Progress
from rlsys.observe.progress_view import Shown, as_line
from rlsys.records import Version

LIVE = {
    "rollouts_per_s": 8.123,
    "tokens_per_s": 1234.5,
    "eval/accuracy": 0.71,
    "buffer/buffered": 40,
    "buffer/lead": 128,
    "buffer/lead_limit": 256,
    "rollout/running": 64,
    "idle/trainer": 0.12,
    "idle/rollout": 0.034,
    "dropped/too_stale": 3.0,
    "dropped/reward_error": 1.0,
    "dropped/empty": 0.0,
}
STEP = {"critic/score/mean": 0.6344, "staleness/mean": 0.875, "staleness/max": 1}


def version(step):
    return Version(incarnation=0, step=step)


def test_line_says_everything_a_watcher_asks():
    shown = Shown(step=12, total_steps=20, version="0.12", elapsed_s=3723.9, values={**LIVE, **STEP})
    assert as_line(shown) == (
        "step 12/20 | version 0.12 | 1:02:03 | reward 0.634 | held-out 0.710 | rollouts/s 8.12 | tokens/s 1234 | "
        "running 64 | buffered 40 | lead 128/256 | staleness 0.88 (max 1) | idle trainer 12% rollout 3% | "
        "dropped 4 (too_stale 3, reward_error 1)"
    )


def test_line_leaves_out_what_is_not_known():
    shown = Shown(step=0, total_steps=20, version="0.0", elapsed_s=0.0)
    assert as_line(shown) == "step 0/20 | version 0.0 | 0:00:00"


def test_without_a_terminal_there_is_a_line_per_step_or_ten_seconds():
    now = [0.0]
    stream = io.StringIO()
    progress = Progress(stream, total_steps=2, clock=lambda: now[0])
    for _ in range(50):  # 25 s of live values, twice a second
        now[0] += 0.5
        progress.live({"buffer/lead": now[0]})
    progress.step(1, version(1), {})
    progress.event("rollout-1 is out of service")
    progress.close("done")
    assert stream.getvalue().splitlines() == [
        "step 0/2 | version 0.0 | 0:00:10 | lead 10",
        "step 0/2 | version 0.0 | 0:00:20 | lead 20",
        "step 1/2 | version 0.1 | 0:00:25 | lead 25",
        "rollout-1 is out of service",
        "done",
    ]


class Terminal:
    """A pseudo terminal of a given size, and what was written to it."""

    def __init__(self, columns, lines):
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self._text = b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        try:
            while data := os.read(self._master, 65536):
                self._text += data
        except OSError:  # the other side is closed
            return

    def text(self):
        self.stream.close()
        self._thread.join(10)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._text.decode())


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(progress_module, "REFRESH_S", 0.02)
    monkeypatch.setenv("TERM", "xterm")


def show_a_run(stream):
    progress = Progress(stream, total_steps=20)
    progress.live(LIVE)
    progress.step(12, version(12), STEP)
    progress.event("eval: accuracy [0.710] of 500")
    time.sleep(0.1)
    progress.close("done: 12 steps")
    return progress


def test_terminal_shows_one_panel_with_the_same_figures(quick):
    terminal = Terminal(columns=100, lines=40)
    show_a_run(terminal.stream)
    text = terminal.text()
    for words in ("step 12/20", "version 0.12", "0.634", "128/256", "0.88 (max 1)", "trainer 12%", "too_stale 3"):
        assert words in text, words
    assert "eval: accuracy [0.710] of 500" in text  # brackets are text, not markup
    assert text.rstrip().endswith("done: 12 steps")


@pytest.mark.parametrize(("columns", "lines"), [(10, 3), (1, 1), (0, 0)])
def test_terminal_of_any_size_is_written_to_the_end(quick, columns, lines):
    terminal = Terminal(columns, lines)
    show_a_run(terminal.stream)
    assert "done: 12 steps" in terminal.text()


def test_dumb_terminal_gets_plain_lines(quick, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal(100, 40)
    show_a_run(terminal.stream)
    assert terminal.text().splitlines()[0].startswith("step 12/20 | version 0.12")


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_terminal_that_is_gone_silences_the_view_and_not_the_run(quick):
    terminal = Terminal(100, 40)
    progress = Progress(terminal.stream, total_steps=20)
    terminal.stream.close()
    progress.step(1, version(1), STEP)
    progress.close("done")
    plain = io.StringIO()
    progress = Progress(plain, total_steps=20)
    plain.close()
    progress.step(1, version(1), STEP)
    progress.close("done")
    assert not progress._thread.is_alive()


def test_terminal_that_is_stopped_does_not_stop_the_run():
    class Stopped(io.StringIO):
        def write(self, text):
            time.sleep(60)
            return 0

    progress = Progress(Stopped(), total_steps=2000)
    began = time.monotonic()
    for step in range(2000):
        progress.step(step, version(step), STEP)
    assert time.monotonic() - began < 5.0
