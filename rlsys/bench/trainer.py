"""``rlsys bench trainer``: what the learner makes of two cores, at SmolLM2-135M's shape with random weights.

What is compared takes turns, one step each, after one step that warms up; figures are ratios of medians. A step is
forward, backward and optimizer, of everything named here.

* packed over padded: sequences whose mean length is 0.4 of the longest, in the rows that a run would have, and as rows
  of one sequence, all as long as the longest. Both within the same number of tokens a microbatch.
* overhead: a learner's step on the packed batch, over the same microbatches through a bare DeepSpeed loop. That may be
  below 0: DeepSpeed copies the gradient of a rank that is alone to and fro, as if there were others to add it up with,
  and the learner tells it not to.
* naive: 1,024 tokens as 8 sequences through a plain loop of transformers with the softmax of whole float32 logits, in
  one row whose positions restart, and as 8 rows.
* log-probabilities: forward and backward of the head alone, and the naive loop's step on the 8 rows with our head
  instead of whole logits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from rlsys.bench.report import Report
from rlsys.bench.timing import threads
from rlsys.bench.trainer_batches import Sizes, fill, make_model, make_samples, packed, padded, skewed_lengths
from rlsys.bench.trainer_head import HeadFigures, HeadSizes, measure_head
from rlsys.bench.trainer_sides import DTYPES, Side, Work, running
from rlsys.models.shape import shape_of

SIZES = Sizes(is_tiny=False, sequences=20, longest=160, tokens_per_microbatch=1280, rows=8, row_tokens=128, repeats=3)
HEAD_TOKENS = 2048
THREADS = 2
PACKED_WANTED, OVERHEAD_WANTED, MEMORY_WANTED = 2.0, 0.05, 0.15

OURS, OURS_HALF = Side(kind="ours"), Side(kind="ours", dtype="bfloat16")
NAIVE, NAIVE_HALF = Side(kind="naive"), Side(kind="naive", dtype="bfloat16")
LEAN, LEAN_HALF = Side(kind="lean"), Side(kind="lean", dtype="bfloat16")
BARE, TWO_RANKS = Side(kind="bare"), Side(kind="ours", ranks=2, threads=1)
# Compared with one another; no more processes at once than one comparison needs, for the memory's sake.
COMPARISONS: Mapping[str, Mapping[str, tuple[Side, Work]]] = {
    "layout": {"packed": (OURS, "packed"), "padded": (OURS, "padded"), "bare": (BARE, "packed")},
    "loops": {
        "ours": (OURS, "rows"),
        "ours_bf16": (OURS_HALF, "rows"),
        "naive": (NAIVE, "one_row"),
        "naive_bf16": (NAIVE_HALF, "one_row"),
        "naive_rows": (NAIVE, "rows"),
        "naive_rows_bf16": (NAIVE_HALF, "rows"),
    },
    "head": {
        "lean": (LEAN, "rows"),
        "lean_bf16": (LEAN_HALF, "rows"),
        "whole_logits": (NAIVE, "rows"),
        "whole_logits_bf16": (NAIVE_HALF, "rows"),
    },
    "ranks": {"one_rank": (OURS, "packed"), "two_ranks": (TWO_RANKS, "packed")},
}


def measure(sizes: Sizes = SIZES) -> Report:
    """Figures: ``packed_over_padded``, ``overhead_over_bare_deepspeed`` and ``logprob_extra_memory_over_naive`` (the
    worse of both precisions), tokens/s of every loop (``tokens_per_s/<name>``), and ratios made of them.

    Raises:
        RlsysError: a process failed.
    """
    with tempfile.TemporaryDirectory(prefix="rlsys-trainer-") as folder:
        make_model(Path(folder), sizes)
        shape = shape_of(folder)
        head_sizes = HeadSizes(
            vocab_size=shape.vocab_size,
            width=shape.width,
            tokens=sizes.row_tokens if sizes.is_tiny else HEAD_TOKENS,
            repeats=2 * sizes.repeats + 1,  # it is short, and what the whole logits' memory costs varies
        )
        with threads(THREADS):
            heads = {name: measure_head(head_sizes, dtype) for name, dtype in DTYPES.items()}
        seconds: dict[str, float] = {}
        for sides in COMPARISONS.values():
            seconds |= _compared(sides, folder, sizes)
    skewed = make_samples(skewed_lengths(sizes), shape.vocab_size)
    fills = {"packed": fill(packed(skewed, sizes, shape.token_cost).for_rank(0)), "padded": fill(padded(skewed, sizes))}
    figures = figures_of(seconds, heads, fills, tokens_of(sizes))
    return Report(figures=figures, table=_table(sizes, figures))


def tokens_of(sizes: Sizes) -> dict[str, int]:
    """Tokens of one step of each thing that is compared, padding left out."""
    of_work = {"rows": sizes.rows * sizes.row_tokens, "one_row": sizes.rows * sizes.row_tokens}
    skewed = sum(skewed_lengths(sizes))
    return {name: of_work.get(work, skewed) for sides in COMPARISONS.values() for name, (_, work) in sides.items()}


def figures_of(
    seconds: Mapping[str, float],
    heads: Mapping[str, HeadFigures],
    fills: Mapping[str, float],
    tokens: Mapping[str, int],
) -> dict[str, float]:
    """All figures of the report, from the median seconds of each thing that was compared."""
    memory = {name: found.lean_bytes / found.naive_bytes for name, found in heads.items()}
    return {
        "packed_over_padded": seconds["padded"] / seconds["packed"],
        "overhead_over_bare_deepspeed": seconds["packed"] / seconds["bare"] - 1.0,
        "logprob_extra_memory_over_naive": max(memory.values()),
        **{f"logprob_extra_memory_over_naive/{name}": share for name, share in memory.items()},
        **{f"logprob_seconds_over_naive/{name}": found.lean_s / found.naive_s for name, found in heads.items()},
        **{f"logprob_extra_mb/{name}": found.lean_bytes / 1e6 for name, found in heads.items()},
        "lean_over_whole_logits": seconds["lean"] / seconds["whole_logits"],
        "lean_over_whole_logits_bf16": seconds["lean_bf16"] / seconds["whole_logits_bf16"],
        "bf16_over_fp32": seconds["ours"] / seconds["ours_bf16"],
        "two_ranks_over_one": seconds["one_rank"] / seconds["two_ranks"],
        "over_naive": seconds["naive"] / seconds["ours"],
        "over_naive_bf16": seconds["naive_bf16"] / seconds["ours_bf16"],
        "over_naive_rows": seconds["naive_rows"] / seconds["ours"],
        "over_naive_rows_bf16": seconds["naive_rows_bf16"] / seconds["ours_bf16"],
        **{f"fill/{name}": share for name, share in fills.items()},
        **{f"tokens_per_s/{name}": tokens[name] / taken for name, taken in seconds.items()},
    }


def _compared(sides: Mapping[str, tuple[Side, Work]], folder: str, sizes: Sizes) -> dict[str, float]:
    """Median seconds of each, taken in turns."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    with ExitStack() as stack:
        processes = {side: stack.enter_context(running(side, folder, sizes)) for side, _ in sides.values()}
        for turn in range(1 + sizes.repeats):  # the first one warms up
            for name, (side, work) in sides.items():
                found = processes[side].seconds(work)
                if turn > 0:
                    taken[name].append(found)
    return {name: median(values) for name, values in taken.items()}


def _table(sizes: Sizes, figures: Mapping[str, float]) -> str:
    lines = [f"{'a whole step':<20}{'tokens/s':>10}"]
    for name in tokens_of(sizes):
        lines.append(f"{name:<20}{figures[f'tokens_per_s/{name}']:>10,.0f}")
    lines += [
        f"packed over padded (fill {figures['fill/padded']:.2f}): {figures['packed_over_padded']:.2f} (wanted "
        f"{PACKED_WANTED:g}); over bare DeepSpeed: {figures['overhead_over_bare_deepspeed']:+.1%} (wanted under "
        f"{OVERHEAD_WANTED:.0%})",
        f"bfloat16 over float32: {figures['bf16_over_fp32']:.2f}; two ranks over one with two threads: "
        f"{figures['two_ranks_over_one']:.2f}",
        f"over the naive loop on one row: {figures['over_naive']:.2f}, in bfloat16 {figures['over_naive_bf16']:.2f}; "
        f"on rows: {figures['over_naive_rows']:.2f}, in bfloat16 {figures['over_naive_rows_bf16']:.2f}",
        f"seconds of a step with our head over those with whole logits: {figures['lean_over_whole_logits']:.2f}, in "
        f"bfloat16 {figures['lean_over_whole_logits_bf16']:.2f} (wanted 1)",
    ]
    for name in DTYPES:
        lines.append(
            f"log-probabilities, {name}: {figures[f'logprob_extra_memory_over_naive/{name}']:.3f} of the naive form's "
            f"memory (wanted {MEMORY_WANTED:g}), {figures[f'logprob_seconds_over_naive/{name}']:.2f} of its time"
        )
    return "\n".join(lines)
