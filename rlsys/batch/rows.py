"""Samples to rows, and rows to microbatches, so that a rank has as little to compute as possible.

Two things cost more than the tokens themselves: padding, and attention over a row that several samples share, whose
dense mask leaves no pair of tokens out. Samples of like length as rows of their own avoid the second, samples that
share rows the first; which is better depends on the lengths and on the model, so both are tried, on classes of
lengths, and what is estimated to cost least is taken.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlsys.batch.cost import TokenCost

Row = list[int]  # indices of the samples that share a row, in their order in it

_CALL_SHARE = 0.05  # what a microbatch costs beyond its rows, over the cost of the tokens of a full one
_CLASSES = 5  # of lengths, each down to half of the one above; the last one goes down to 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Rows in microbatches, and what they are estimated to cost."""

    microbatches: tuple[tuple[Row, ...], ...]
    cost: float

    def plus(self, other: Layout) -> Layout:
        return Layout(microbatches=self.microbatches + other.microbatches, cost=self.cost + other.cost)


_NOTHING = Layout(microbatches=(), cost=0.0)


def lay_out(lengths: Sequence[int], budget: int, cost: TokenCost) -> Layout:
    """Every sample in one row of one microbatch, the dearest microbatch first. A microbatch's rows times the tokens of
    its longest row are at most ``budget``. Depends on the arguments alone.

    Args:
        lengths: of the samples, each at most ``budget``.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    bounds = _class_bounds([lengths[index] for index in order])

    @functools.cache
    def cheapest(start: int) -> Layout:
        """Of the classes from number ``start`` on."""
        if start == len(bounds) - 1:
            return _NOTHING
        options = []
        for end in range(start + 1, len(bounds)):
            of_classes = order[bounds[start] : bounds[end]]
            for lay in (_alone, _shared):
                options.append(_priced(lay(of_classes, lengths, budget), lengths, budget, cost).plus(cheapest(end)))
        return min(options, key=lambda layout: layout.cost)

    found = cheapest(0)
    dearest_first = sorted(found.microbatches, key=lambda rows: -_cost_of(rows, lengths, cost))
    return Layout(microbatches=tuple(dearest_first), cost=found.cost)


def fill_rows(lengths: Sequence[int], capacity: int) -> list[Row]:
    """First-fit decreasing: rows of at most ``capacity`` tokens, each a list of indices into ``lengths``.

    Longest first, equal lengths in their order, each into the first row with room.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    room = np.zeros(len(lengths), dtype=np.int64)
    rows: list[Row] = []
    for index in order.tolist():
        fitting = room[: len(rows)] >= lengths[index]
        row = int(fitting.argmax()) if fitting.any() else len(rows)
        if row == len(rows):
            rows.append([])
            room[row] = capacity
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def _class_bounds(descending: Sequence[int]) -> list[int]:
    """Where classes begin in lengths that are sorted, and where the last one ends; empty classes are left out."""
    bounds = [0]
    for halvings in range(1, _CLASSES):
        shorter = [place for place, length in enumerate(descending) if length * 2**halvings <= descending[0]]
        if shorter and shorter[0] > bounds[-1]:
            bounds.append(shorter[0])
    return [*bounds, len(descending)] if descending else bounds


def _alone(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[tuple[Row, ...]]:
    """A row for each sample, longest first, so that rows of like length meet."""
    microbatches = []
    rest = list(order)
    while rest:
        rows = budget // lengths[rest[0]]
        microbatches.append(tuple([index] for index in rest[:rows]))
        rest = rest[rows:]
    return microbatches


def _shared(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[tuple[Row, ...]]:
    """Rows of up to the tokens of the longest sample, filled with whatever fits."""
    of_order = [lengths[index] for index in order]
    rows = [[order[position] for position in row] for row in fill_rows(of_order, of_order[0])]
    tokens = [sum(lengths[index] for index in row) for row in rows]
    rest = sorted(range(len(rows)), key=lambda row: (-tokens[row], row))
    microbatches = []
    while rest:
        number = budget // tokens[rest[0]]
        microbatches.append(tuple(rows[row] for row in rest[:number]))
        rest = rest[number:]
    return microbatches


def _priced(microbatches: Sequence[tuple[Row, ...]], lengths: Sequence[int], budget: int, cost: TokenCost) -> Layout:
    calls = _CALL_SHARE * cost.linear * budget * len(microbatches)
    return Layout(
        microbatches=tuple(microbatches), cost=calls + sum(_cost_of(rows, lengths, cost) for rows in microbatches)
    )


def _cost_of(rows: Sequence[Row], lengths: Sequence[int], cost: TokenCost) -> float:
    """Every row is padded to the longest; one mask serves them all."""
    longest = max(sum(lengths[index] for index in row) for row in rows)
    of_row = cost.of if all(len(row) == 1 for row in rows) else cost.of_shared
    return len(rows) * of_row(longest)
