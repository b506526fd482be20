"""How far a number of a step stands out from those of the steps before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

WINDOW = 64  # numbers that the median is taken over
MIN_SEEN = 8  # before that many a median says little, and nothing counts as a spike
FACTOR = 3.0  # times the median: a spike


class Spikes:
    """A running median of magnitudes, and a count of those that stood out."""

    def __init__(self) -> None:
        self._recent: list[float] = []
        self.count = 0

    def see(self, value: float) -> float:
        """|value| over the median of the last ones; 1 for the first, and where that median is 0."""
        magnitude = abs(value)
        usual = median(self._recent) if self._recent else 0.0
        ratio = magnitude / usual if usual > 0.0 else 1.0
        if len(self._recent) >= MIN_SEEN and ratio > FACTOR:
            self.count += 1
        self._recent = [*self._recent, magnitude][-WINDOW:]
        return ratio

    def state(self) -> dict[str, list[float]]:
        """Plain numbers, for ``restore``."""
        return {"recent": list(self._recent), "count": [float(self.count)]}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        self._recent, self.count = list(state["recent"]), int(state["count"][0])
