"""A ``SplitPlan`` for the person at the terminal."""

from __future__ import annotations

from rlsys.plan.balance import Bottleneck, Side
from rlsys.plan.split import SplitPlan

GAIN = 1.02  # times as fast as now: below it a split is not worth a change
REACHED = 0.95  # of what a split could do: below it the rest is spoken of
TITLES = {"whole": "balanced, undivided", "in turns": "synchronous, in turns"}


def as_text(plan: SplitPlan) -> str:
    """Rates, splits, and what they say."""
    blocks = (_rates(plan), _splits(plan), [*_findings(plan), *_assumptions(plan)])
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks)


def _rates(plan: SplitPlan) -> list[str]:
    """A line a side: what it does while it works."""
    measured = plan.measured
    each = f"a {plan.unit.removesuffix('s')}"
    lines = [
        f"rates of each side while it works ({measured.origin})",
        f"{'':<22}{plan.unit:>8}{'rollouts/s':>12}{each:>10}{'tokens/s':>10}{'idle':>7}",
    ]
    for name, title, side in (("rollout", "engines", measured.rollout), ("trainer", "trainer", measured.trainer)):
        lines.append(_rate(f"{title}, {side.parts:g}" if measured.idle else title, side, measured.idle.get(name)))
    return lines


def _rate(title: str, side: Side, idle: float | None) -> str:
    tokens = "" if side.tokens_per_s is None else f"{side.tokens_per_s:.4g}"
    waits = "" if idle is None else f"{idle:.0%}"
    each = side.rollouts_per_s / side.cores
    return f"{title:<22}{side.cores:>8.3g}{side.rollouts_per_s:>12.4g}{each:>10.4g}{tokens:>10}{waits:>7}"


def _splits(plan: SplitPlan) -> list[str]:
    """A line a split: what is to be expected of it."""
    batch = plan.rollouts_per_batch
    lines = [
        f"{f'expected, by {plan.unit}':<22}{'trainer':>8}{'engines':>9}{'rollouts/s':>12}{'s a step':>10}"
        f"{'trainer idle':>14}{'engines idle':>14}"
    ]
    for name, split in plan.splits.items():
        step = "" if batch is None else f"{split.step_s(batch):.4g}"
        lines.append(
            f"{TITLES.get(name, name):<22}{split.trainer_cores:>8.3g}{split.rollout_cores:>9.3g}"
            f"{split.rollouts_per_s:>12.4g}{step:>10}{split.trainer_idle:>14.0%}{split.rollout_idle:>14.0%}"
        )
    step = "" if batch is None else f"{batch / plan.in_turns_per_s:.4g}"
    lines.append(f"{TITLES['in turns']:<22}{plan.cores:>8.3g}{plan.cores:>9.3g}{plan.in_turns_per_s:>12.4g}{step:>10}")
    return lines


def _findings(plan: SplitPlan) -> list[str]:
    unit, present, best = plan.unit, plan.splits.get("present"), plan.splits["balanced"]
    lines = []
    if present is not None:
        lines.append(
            {
                Bottleneck.ROLLOUT: "The engines are the bottleneck: the trainer is to wait "
                f"{present.trainer_idle:.0%} of the time.",
                Bottleneck.TRAINER: "The trainer is the bottleneck: the engines are to wait "
                f"{present.rollout_idle:.0%} of the time.",
                Bottleneck.NEITHER: f"Both sides are equally fast: the {unit} are divided as they should be.",
            }[present.bottleneck]
        )
    if plan.reached is not None and plan.reached < REACHED:
        lines.append(
            f"The run did {plan.measured.rollouts_per_s:.4g} rollouts/s, {plan.reached:.0%} of what is expected of its "
            "split. The rest went to waits that no split removes: stragglers, a short lead, checkpoints."
        )
    gain = "" if plan.gain is None else f", {plan.gain:.2f} times as fast as the present split"
    if best.bottleneck is Bottleneck.NEITHER:
        lines.append(f"theta* = {best.trainer_share:.1%} of the {unit} for the trainer: balanced{gain}.")
    else:
        lines.append("No split balances them: one side stays slower with nearly everything.")
    if present is not None and (whole := plan.splits.get("whole")) is not None:
        faster = whole.rollouts_per_s / present.rollouts_per_s
        lines.append(
            f"In whole {unit}: {whole.trainer_cores:g} for the trainer, {whole.rollout_cores:g} for the engines, "
            f"{faster:.2f} times as fast as the present split."
            if faster >= GAIN
            else f"In whole {unit} no split is more than {GAIN - 1:.0%} faster than the present one."
        )
    lines.append(
        f"Both sides at once, balanced, are {plan.gain_over_turns:.2f} times as fast as taking turns with all {unit}."
    )
    return lines


def _assumptions(plan: SplitPlan) -> list[str]:
    asked, config, unit = plan.asked, plan.config, plan.unit
    lines = [
        f"Assumed: with twice the {unit} the engines are {asked.rollout_doubling:g} times as fast, the trainer "
        f"{asked.trainer_doubling:g} times (--rollout-doubling, --trainer-doubling); lengths and drops stay."
    ]
    if config is not None and config.rollout.max_staleness == 0:
        lines.append("rollout.max_staleness is 0, so the sides take turns; the splits are those of a run at 1 or more.")
    if config is not None and config.teacher.path is not None:
        lines.append(f"The teacher's {unit} are not divided.")
    return lines
