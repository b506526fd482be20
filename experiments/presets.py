"""Presets on stale data: each learns the quickstart's task from rollouts that are about four batches old.

python -m experiments.presets [--presets a,b] [--seeds 3] [--root DIR] [--out docs/experiments.md]
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from experiments.runs import Outcome, arguments, each, is_stale, markdown_table, mean, outcome, put_table

PRESETS = ("grpo", "dapo", "gspo", "cispo", "areal", "llamarl", "icepop", "ppo")
KEYS: Mapping[str, str] = {
    "rollout.max_staleness": "4",  # a full lead is held, the oldest is trained first: about 3.8 on average
    "run.steps": "70",
    "train.lr": "1e-4",  # half of the quickstart's, which overshoots when the data are this old
}
OWN_KEYS: Mapping[str, Mapping[str, str]] = {
    # the head of a critic is new, and has to be there before the policy has moved far
    "ppo": {"critic.lr": "1e-3", "critic.warmup_steps": "2"},
    # the engine samples three groups for each that is trained: with small microbatches, which change no gradient, the
    # same step takes the learner longer, and the lead is held; learning is done earlier
    "dapo": {"train.tokens_per_microbatch": "64", "run.steps": "45"},
}
TARGET = 0.85
LEAST_STALENESS = 3.0


def outcomes_of(presets: tuple[str, ...], seeds: int, root: Path) -> dict[str, list[Outcome]]:
    """The runs of each preset, one a seed. All presets run with one seed before any runs with the next."""
    found: dict[str, list[Outcome]] = {preset: [] for preset in presets}
    for seed in range(seeds):
        for preset in presets:
            keys = {"algo.preset": preset, "run.seed": str(seed), **KEYS, **OWN_KEYS.get(preset, {})}
            found[preset].append(outcome(preset, keys, root))
    return found


def table_of(found: Mapping[str, list[Outcome]]) -> str:
    """One line a preset."""
    head = ("preset", "accuracy after", "mean", "best seen", "staleness/mean", "clip fraction", "dropped", "seconds")
    rows = [
        (
            preset,
            each(outcomes, lambda run: run.last),
            mean(outcomes, lambda run: run.last),
            each(outcomes, lambda run: run.best),
            each(outcomes, lambda run: run.staleness_mean, 2),
            mean(outcomes, lambda run: run.clip_fraction, 4),
            mean(outcomes, lambda run: run.dropped, 4),
            mean(outcomes, lambda run: run.wall_s, 0),
        )
        for preset, outcomes in found.items()
    ]
    return markdown_table(head, rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--presets", default=",".join(PRESETS), help="separated by commas")
    given = parser.parse_args()
    found = outcomes_of(tuple(given.presets.split(",")), given.seeds, given.root)
    table = table_of(found)
    print(table)
    for preset, outcomes in found.items():
        for seed, run in enumerate(outcomes):
            if run.last is None or run.last < TARGET:
                print(f"{preset}, seed {seed}: below {TARGET}. {run.failure}")
            if not is_stale(run, LEAST_STALENESS):
                print(f"{preset}, seed {seed}: staleness/mean below {LEAST_STALENESS}: the engine could not keep ahead")
    if given.out:
        put_table(given.out, "presets", table)


if __name__ == "__main__":
    main()
