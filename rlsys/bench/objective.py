"""``rlsys bench objective``: every policy loss, with and without a correction, over a million packed tokens in one
piece, on one thread.

Time is that of the pre-pass where a row has one, of ``policy_objective`` and of the backward pass: the fastest of a
few, since the machine may be busy. Memory is the most that torch's allocator held at once beyond the inputs, added up
from every allocation and release that the profiler saw in such a pass: exact, and the same in every run. The gradient
of the log-probabilities (4 bytes a token) is in it. Legend: T packed tokens, S sequences.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from rlsys.algo import AGGREGATIONS, CORRECTIONS, POLICY_LOSSES
from rlsys.algo.draws import token_draws
from rlsys.algo.objective import objective_statistics, policy_objective, settle_rows
from rlsys.algo.rows import facts_of
from rlsys.algo.segments import Segments
from rlsys.bench.report import Report
from rlsys.bench.timing import fastest_s, threads

NUM_TOKENS = 1_000_000
REPEATS = 3
CORRECTIONS_MEASURED = ("none", "tis")
MEDIAN_LENGTH, LENGTH_SIGMA = 400.0, 0.8  # tokens; sigma of the logarithm: one in a hundred is six times as long
PROMPT_SHARE = 0.1  # of a sequence: tokens without weight
MAX_SECONDS, MAX_BYTES_PER_TOKEN = 2.0, 64.0  # for one million tokens


def measure(num_tokens: int = NUM_TOKENS, repeats: int = REPEATS) -> Report:
    """Figures: ``seconds/<loss>`` and ``bytes_per_token/<loss>``, the larger of those with and without correction, and
    the largest of all as ``seconds_max`` and ``bytes_per_token_max``."""
    inputs = make_inputs(num_tokens)
    seconds: dict[str, list[float]] = {}
    bytes_per_token: dict[str, list[float]] = {}
    with threads(1):
        for loss in POLICY_LOSSES:
            passes = [_pass_of(loss, correction, inputs) for correction in CORRECTIONS_MEASURED]
            bytes_per_token[loss] = [peak_bytes(one_pass) / num_tokens for one_pass in passes]
            seconds[loss] = [fastest_s(one_pass, repeats) for one_pass in passes]
    figures = {
        "seconds_max": max(max(values) for values in seconds.values()),
        "bytes_per_token_max": max(max(values) for values in bytes_per_token.values()),
        **{f"seconds/{loss}": max(values) for loss, values in seconds.items()},
        **{f"bytes_per_token/{loss}": max(values) for loss, values in bytes_per_token.items()},
    }
    return Report(figures=figures, table=_table(num_tokens, seconds, bytes_per_token))


def make_inputs(num_tokens: int) -> dict[str, Any]:
    """Random tokens of sequences with log-normal lengths, by the names of the legend, the same in every call."""
    source = torch.Generator().manual_seed(0)

    def normal(size: int) -> torch.Tensor:
        return torch.randn(size, generator=source)

    lengths_S = (math.log(MEDIAN_LENGTH) + LENGTH_SIGMA * normal(num_tokens)).exp().long().clamp(min=2)
    ends_S = lengths_S.cumsum(0)
    starts_S = torch.cat([torch.zeros(1, dtype=torch.int64), ends_S[ends_S < num_tokens]])
    segments = Segments(starts_S, num_tokens)
    within_T = torch.arange(num_tokens) - segments.spread(segments.starts_S)
    behaviour_logprobs_T = -normal(num_tokens).abs()
    proximal_logprobs_T = (behaviour_logprobs_T + 0.1 * normal(num_tokens)).clamp(max=0.0)
    return {
        "policy_logprobs_T": (proximal_logprobs_T + 0.1 * normal(num_tokens)).clamp(max=0.0).requires_grad_(),
        "proximal_logprobs_T": proximal_logprobs_T,
        "behaviour_logprobs_T": behaviour_logprobs_T,
        "advantages_T": segments.spread(normal(segments.num_segments)),
        "mask_T": within_T >= PROMPT_SHARE * segments.spread(segments.lengths_S),
        "on_policy_mask_T": within_T % 2 == 0,
        "correct_T": segments.spread(normal(segments.num_segments) > 0.0),
        "token_draws_T": token_draws(torch.arange(segments.num_segments), segments),
        "segments": segments,
    }


def peak_bytes(run: Callable[[], None]) -> int:
    """The most that torch's CPU allocator held at once, in the calling thread, beyond what it held before."""
    with _quiet_errors(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    return max(accumulate((event["args"]["Bytes"] for event in changes), initial=0))


def _pass_of(loss_name: str, correction_name: str, inputs: Mapping[str, Any]) -> Callable[[], None]:
    """Pre-pass, forward and backward of these rows with their defaults. Leaves no gradient behind."""
    loss, correction = POLICY_LOSSES[loss_name], CORRECTIONS[correction_name]
    facts = facts_of(loss)
    aggregation = AGGREGATIONS[(*facts.aggregations, "token_mean")[0]]
    anchor = facts.anchor or "proximal"
    rows: dict[str, Any] = {"loss": loss, "correction": correction}
    policy_logprobs_T = inputs["policy_logprobs_T"]

    def run() -> None:
        frozen = {**inputs, "policy_logprobs_T": policy_logprobs_T.detach()}
        settled = settle_rows(**rows, statistics=objective_statistics(**rows, anchor=anchor, **frozen))
        result = policy_objective(**rows, anchor=anchor, aggregation=aggregation, settled=settled, **inputs)
        count = 1.0 if result.count is None else result.count
        (result.loss_sum / count).backward()
        policy_logprobs_T.grad = None

    return run


@contextmanager
def _quiet_errors() -> Iterator[None]:
    """File descriptor 2 leads nowhere: the profiler's library notes its every start and stop there."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _table(num_tokens: int, seconds: Mapping[str, list[float]], bytes_per_token: Mapping[str, list[float]]) -> str:
    """One line a loss: seconds, then bytes a token, each without and with correction."""
    names = " ".join(f"{f'{what} {name}':>14}" for what in ("s", "B/token") for name in CORRECTIONS_MEASURED)
    lines = [f"{num_tokens:,} tokens, one thread, forward and backward", f"{'loss':<16}{names}"]
    for loss in seconds:
        cells = [f"{value:14.3f}" for value in seconds[loss]] + [f"{value:14.1f}" for value in bytes_per_token[loss]]
        lines.append(f"{loss:<16}{' '.join(cells)}")
    lines.append(f"wanted for a million tokens: at most {MAX_SECONDS:g} s and {MAX_BYTES_PER_TOKEN:g} B/token")
    return "\n".join(lines)
