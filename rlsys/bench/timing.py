"""How the benches take time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def fastest_s(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of so many runs, since the machine may be busy. One more before them warms up."""
    run()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Within, torch has so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
