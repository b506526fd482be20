"""Is a correction worth it? Decoupled PPO on data about seven batches old, with its correction and without.

The learning rate is the one that is best for the arm without a correction; all arms then run with it.

python -m experiments.correction [--seeds 3] [--root DIR] [--out docs/experiments.md]
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from experiments.runs import Outcome, arguments, each, is_stale, markdown_table, mean, outcome, put_table

KEYS: Mapping[str, str] = {
    "algo.preset": "areal",
    "rollout.max_staleness": "8",
    "run.steps": "70",
    "train.tokens_per_microbatch": "256",  # the same step takes the learner longer, so that the engine keeps ahead
}
UNCORRECTED: Mapping[str, str] = {"algo.correction": "{name: none}", "algo.allow_uncorrected": "true"}
ARMS: Mapping[str, Mapping[str, str]] = {
    "corrected": {},
    "uncorrected": UNCORRECTED,
}
MEANING: Mapping[str, str] = {
    "corrected": "clip at the proximal policy, weighted by proximal / behaviour (preset areal)",
    "uncorrected": "clip at the proximal policy, no weight",
}
TUNED_ARM, TUNED_SEED = "uncorrected", 0
LRS = ("5e-5", "1e-4", "2e-4")
LEAST_STALENESS = 6.0


def run_arm(arm: str, lr: str, seed: int, root: Path) -> Outcome:
    return outcome(arm, {**KEYS, **ARMS[arm], "train.lr": lr, "run.seed": str(seed)}, root)


def tuning_table(tuned: Mapping[str, Outcome]) -> str:
    """One line a learning rate."""
    head = ("learning rate", "accuracy after", "mean of the last three", "best seen")
    rows = [
        (lr, each([run], lambda run: run.last), each([run], lambda run: run.late), each([run], lambda run: run.best))
        for lr, run in tuned.items()
    ]
    return markdown_table(head, rows)


def arms_table(found: Mapping[str, list[Outcome]]) -> str:
    """One line an arm."""
    head = ("arm", "accuracy after", "mean", "mean of the last three", "best seen", "staleness/mean", "clip fraction")
    rows = [
        (
            f"{arm}: {MEANING[arm]}",
            each(outcomes, lambda run: run.last),
            mean(outcomes, lambda run: run.last),
            each(outcomes, lambda run: run.late),
            each(outcomes, lambda run: run.best),
            each(outcomes, lambda run: run.staleness_mean, 2),
            mean(outcomes, lambda run: run.clip_fraction, 4),
        )
        for arm, outcomes in found.items()
    ]
    return markdown_table(head, rows)


def main() -> None:
    given = arguments(__doc__).parse_args()
    tuned = {lr: run_arm(TUNED_ARM, lr, TUNED_SEED, given.root) for lr in LRS}
    best = max(tuned, key=lambda lr: tuned[lr].late or 0.0)
    found: dict[str, list[Outcome]] = {arm: [] for arm in ARMS}
    for seed in range(given.seeds):
        for arm in ARMS:
            found[arm].append(run_arm(arm, best, seed, given.root))
    tables = {"correction_tuning": tuning_table(tuned), "correction": arms_table(found)}
    for name, table in tables.items():
        print(table)
        if given.out:
            put_table(given.out, name, table)
    print(f"learning rate of all arms: {best}")
    for arm, outcomes in found.items():
        for seed, run in enumerate(outcomes):
            if not is_stale(run, LEAST_STALENESS):
                print(f"{arm}, seed {seed}: staleness/mean below {LEAST_STALENESS}: the engine could not keep ahead")


if __name__ == "__main__":
    main()
