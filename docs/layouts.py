"""Writes docs/layouts.md: one step of every tiny model in every layout, against plain transformers.

python -m docs.layouts
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rlsys.algo.catalogue import markdown_table
from tests.laws.layouts import ADAM_LAYOUTS, ADAM_MODEL, ADAM_STEPS, LAYOUTS, MODELS, Steps, can_run
from tests.laws.learner_ranks import Ranks

PATH = Path(__file__).with_suffix(".md")
ADAM_COLUMN = f"{ADAM_STEPS} steps of AdamW"

HEAD = f"""# Layouts

<!-- Written by `python -m docs.layouts`, which measures. Change that, not this file. -->

A step is the same however it is spread: over microbatches, rows, processes, pieces of layers, pieces of the optimizer.
Each cell is the largest of three relative differences after one step of SGD in float32: of the loss, of the gradient
norm, and of the gradient itself, |difference| / |gradient| over all weights together. The reference is plain
transformers: one process, one sequence after the other, whole logits, a loss written out by hand. The bound is 1e-5.

*dp*: data-parallel ranks, `train.ranks`. *tp*: processes that share the layers of each of them,
`train.tensor_parallel` (dp 2 x tp 2 is four processes). *ep*: data-parallel ranks that share the experts,
`train.expert_parallel` (dp 4, ep 2 is four processes: two groups, each with all experts). *sp*: processes that share
the rows of each rank, `train.sequence_parallel`. *ZeRO*: `train.zero_stage`, no parameter kept whole.
Microbatches have 128 tokens where nothing else is said, and 64 in some rows with processes, so that the split differs
too. Wherever the logits are what the last layer gives, log-probabilities come straight from its weight (lean), so that
every row compares lean with whole logits; Gemma 2 caps its logits and is trained from whole ones. No figure:
DeepSpeed's tensor parallel does not cut experts, a dense model has none to share, and sequence parallel needs full
attention and as many key-value heads as divide; `rlsys check` refuses the rest. *Offloaded*: `train.offload`.

The last column is the largest absolute difference of a loss over {ADAM_STEPS} recorded batches, trained with AdamW,
weight decay and clipping, from those of torch's own AdamW in one process ({ADAM_MODEL}); the bound is 1e-4. Where the
optimizer is offloaded it is DeepSpeed's compiled one.

"""


def text(cells: dict[tuple[str, str], float]) -> str:
    """The whole file. ``cells``: by layout, and model or ``ADAM_COLUMN``."""
    columns = (*MODELS, ADAM_COLUMN)
    rows = [
        (layout, *(f"{cells[layout, column]:.1e}" if (layout, column) in cells else "" for column in columns))
        for layout in LAYOUTS
    ]
    shown = markdown_table(("model", "what it shows"), [(name, model.shows) for name, model in MODELS.items()])
    return f"{HEAD}{markdown_table(('layout', *columns), rows)}\n{shown}"


def read_table() -> list[list[str]]:
    """Cells of the written table, its head first."""
    lines = [line for line in PATH.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[: len(LAYOUTS) + 2]]
    return [table[0], *table[2:]]


def main() -> None:
    pair, four = Ranks(2), Ranks(4)
    try:
        with tempfile.TemporaryDirectory() as folder:
            steps = Steps(pair, four, Path(folder))
            cells = {
                (layout, model): steps.difference(model, LAYOUTS[layout]).worst
                for layout in LAYOUTS
                for model in MODELS
                if can_run(MODELS[model], LAYOUTS[layout])
            }
            cells |= {(layout, ADAM_COLUMN): steps.adam_gap(LAYOUTS[layout]) for layout in ADAM_LAYOUTS}
    finally:
        pair.stop()
        four.stop()
    PATH.write_text(text(cells), encoding="utf-8")


if __name__ == "__main__":
    main()
