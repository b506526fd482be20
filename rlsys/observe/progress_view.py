"""What the person who watches sees: the figures, as one plain line or as a panel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

_PLAIN = (  # label, metric, how to write it
    ("reward", "critic/score/mean", "{:.3f}"),
    ("held-out", "eval/accuracy", "{:.3f}"),
    ("rollouts/s", "rollouts_per_s", "{:.2f}"),
    ("tokens/s", "tokens_per_s", "{:.0f}"),
    ("running", "rollout/running", "{:.0f}"),
    ("buffered", "buffer/buffered", "{:.0f}"),
)
_DROPPED = "dropped/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """One state of the run, as it is shown.

    Attributes:
        values: latest value of each metric.
        events: the last sentences, oldest first.
        elapsed_s: seconds since the view was opened.
    """

    step: int
    total_steps: int
    version: str
    elapsed_s: float
    values: Mapping[str, float] = field(default_factory=dict)
    events: Sequence[str] = ()


def figures(values: Mapping[str, float]) -> list[tuple[str, str]]:
    """Label and text of what is known; what is not is left out."""
    rows = [(label, form.format(values[name])) for label, name, form in _PLAIN if name in values]
    if "buffer/lead" in values:
        limit = f"/{values['buffer/lead_limit']:.0f}" if "buffer/lead_limit" in values else ""
        rows.append(("lead", f"{values['buffer/lead']:.0f}{limit}"))
    if "staleness/mean" in values:
        most = f" (max {values['staleness/max']:.0f})" if "staleness/max" in values else ""
        rows.append(("staleness", f"{values['staleness/mean']:.2f}{most}"))
    idle = [f"{who} {values[f'idle/{who}']:.0%}" for who in ("trainer", "rollout") if f"idle/{who}" in values]
    if idle:
        rows.append(("idle", " ".join(idle)))
    dropped = {name.removeprefix(_DROPPED): number for name, number in values.items() if name.startswith(_DROPPED)}
    if dropped:
        causes = ", ".join(f"{cause} {number:.0f}" for cause, number in dropped.items() if number)
        rows.append(("dropped", f"{sum(dropped.values()):.0f}" + (f" ({causes})" if causes else "")))
    return rows


def as_line(shown: Shown) -> str:
    parts = [f"step {shown.step}/{shown.total_steps}", f"version {shown.version}", _clock(shown.elapsed_s)]
    return " | ".join(parts + [f"{label} {text}" for label, text in figures(shown.values)])


def as_panel(shown: Shown) -> RenderableType:
    from rich.console import Group
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    head = Text(f"step {shown.step}/{shown.total_steps}   version {shown.version}   {_clock(shown.elapsed_s)}", "bold")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column()
    for label, text in figures(shown.values):
        grid.add_row(Text(label), Text(text))
    events = [Text(event, "dim", no_wrap=True, overflow="ellipsis") for event in shown.events]
    bar = Table.grid(expand=True)  # a bar alone does not end its line
    bar.add_row(ProgressBar(total=max(shown.total_steps, 1), completed=shown.step))
    return Panel(Group(head, bar, grid, *events), title="rlsys")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
