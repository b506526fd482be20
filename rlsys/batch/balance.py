"""Work dealt to ranks so that the one with the most of it has little more than the others: they wait for it.

Legend: S pieces of work, P parts.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

Parts = list[list[int]]  # for each part the indices of its pieces, ascending


def balanced(costs_S: Sequence[float], num_parts: int) -> Parts:
    """Each piece in exactly one part; the better of two heuristics by the dearest part, Karmarkar and Karp's where they
    are equal. Which of the two wins depends on the costs, and both take next to no time.

    The dearest part costs at most the mean of the parts plus the dearest piece. Depends on the arguments alone.
    """
    candidates = (_by_differences(costs_S, num_parts), _longest_first(costs_S, num_parts))
    return min(candidates, key=lambda parts: max(_sums(costs_S, parts)))


def _by_differences(costs_S: Sequence[float], num_parts: int) -> Parts:
    """The largest differencing method (Karmarkar and Karp, 1982), for any number of parts: of all partial solutions
    the two whose parts differ most are merged, the dearest part of the one with the cheapest of the other."""
    # (minus the spread, number, sums, parts), sums descending; the number settles ties
    heap: list[tuple[float, int, list[float], Parts]] = []
    for index, cost in enumerate(costs_S):
        heap.append((-cost, index, [cost] + [0.0] * (num_parts - 1), [[index]] + [[] for _ in range(num_parts - 1)]))
    if not heap:
        return [[] for _ in range(num_parts)]
    heapq.heapify(heap)
    number = len(heap)
    while len(heap) > 1:
        _, _, first_sums, first = heapq.heappop(heap)
        _, _, second_sums, second = heapq.heappop(heap)
        merged = [
            (first_sums[place] + second_sums[-1 - place], first[place] + second[-1 - place])
            for place in range(num_parts)
        ]
        merged.sort(key=lambda part: -part[0])
        sums = [cost for cost, _ in merged]
        heapq.heappush(heap, (sums[-1] - sums[0], number, sums, [pieces for _, pieces in merged]))
        number += 1
    return [sorted(pieces) for pieces in heap[0][3]]


def _longest_first(costs_S: Sequence[float], num_parts: int) -> Parts:
    """The dearest piece first, each to the part that costs least by then."""
    parts: Parts = [[] for _ in range(num_parts)]
    heap = [(0.0, place) for place in range(num_parts)]
    for index in sorted(range(len(costs_S)), key=lambda index: (-costs_S[index], index)):
        cost, place = heapq.heappop(heap)
        parts[place].append(index)
        heapq.heappush(heap, (cost + costs_S[index], place))
    return [sorted(pieces) for pieces in parts]


def _sums(costs_S: Sequence[float], parts: Parts) -> list[float]:
    return [sum(costs_S[index] for index in pieces) for pieces in parts]
