"""``rlsys bench overlap``: what it gains that rollouts and training go on at once, on two cores.

The same questions, answers of the same lengths and the same optimizer steps, on real engines, in four modes:

    synchronous     a batch is sampled, trained and published, then the next one; each side has both cores, and two
                    threads where it is the faster for it
    one_step_off    one batch is sampled while the one before is trained, a core each; rollouts under way end before new
                    weights come, and new ones wait meanwhile
    asynchronous    the same, up to four batches ahead
    partial         the same, but that rollouts under way go on under the new weights, their KV computed again

A synchronous batch waits for its longest answer, with the engine nearly empty, and one side stands still while the
other one works: all that it has instead is the second core, which makes neither side twice as fast. The ceiling is what
would be gained if nothing ever waited and overlapping cost nothing. From the same list and the same run:

    ceiling          = seconds of a synchronous batch / max(engine's seconds, learner's seconds; a batch, one core each)
    share_of_ceiling = speedup_async_over_sync / ceiling,  the speed-up being that of ``partial``
    ideal_from_rates = (engine's + learner's seconds, two cores each) / max(engine's, learner's; one core each)

where each side was measured alone, the engine with its slots full, on the first half of the list before the runs and
on the second one after them: machines get faster and slower in minutes. ``ideal_from_rates`` leaves stragglers out.

Overlapping gains most where both sides need about the same time on a core. The sizes are so chosen that the engine
needs somewhat more, which leaves room on the learner's core for the controller and the rewards: no core is reserved
for those. Before the first batch there is nothing to train, and during the last one nothing to sample: that alone costs
some per cent of the ceiling, the fewer the more batches there are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlsys.bench.alone import Side, on_cores, seconds_alone
from rlsys.bench.overlap_runs import (
    CORES,
    MODES,
    PARTIAL,
    SYNCHRONOUS,
    ModeFigures,
    Sizes,
    config_of,
    inputs_of,
    make_model,
    run_mode,
)
from rlsys.bench.report import Report

# Far fewer slots than a batch has rollouts: at every new version the contexts in all slots are computed again. With
# more slots the engine is faster alone, but pays more for each version.
SIZES = Sizes(
    steps=20, prompts=16, group_size=8, slots=24, longest=400, tokens_per_microbatch=4096, width=256, layers=4
)
SIDES: tuple[Side, ...] = ("engine", "learner")
SHARE_WANTED, SPEEDUP_WANTED = 0.9, 1.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Alone:
    """Seconds of one side alone for a batch."""

    one_core_s: float
    two_cores_s: float

    def mean_with(self, other: Alone) -> Alone:
        """Of as many batches."""
        return Alone(
            one_core_s=(self.one_core_s + other.one_core_s) / 2,
            two_cores_s=(self.two_cores_s + other.two_cores_s) / 2,
        )


def measure(sizes: Sizes = SIZES) -> Report:
    """Figures: the three of the formulas above; ``idle/trainer`` and ``idle/rollout`` of the partial mode;
    ``<mode>/...``; and of each side alone the seconds a batch, ``engine/one_core_s`` and so on.

    Raises:
        ConfigError: the machine has not two cores.
        RlsysError: a run failed.
    """
    with on_cores(CORES), tempfile.TemporaryDirectory(prefix="rlsys-overlap-") as name:
        root, model_path = Path(name), Path(name) / "model"
        make_model(model_path, sizes)
        half = sizes.steps // 2  # of an even number
        before = _both_alone(sizes, range(half), root / "before", model_path)
        threads = {f"{side}_threads": faster_threads(found) for side, found in before.items()}
        modes = {}
        for mode in MODES:
            config = config_of(mode, sizes, root, **(threads if mode == SYNCHRONOUS else {}))
            modes[mode] = run_mode(config, inputs_of(config, model_path))
        after = _both_alone(sizes, range(half, sizes.steps), root / "after", model_path)
    alone = {side: before[side].mean_with(after[side]) for side in SIDES}
    figures = figures_of(modes, **alone)
    figures |= {f"{SYNCHRONOUS}/{name}": float(number) for name, number in threads.items()}
    return Report(figures=figures, table=_table(sizes, modes, alone, figures))


def faster_threads(side: Alone) -> int:
    """Threads of this side of a synchronous run. Small models are often slower with two, and so is everything beside
    other work; overlapping is not to be compared with a baseline that was slowed down."""
    return CORES if side.two_cores_s < side.one_core_s else 1


def figures_of(modes: Mapping[str, ModeFigures], *, engine: Alone, learner: Alone) -> dict[str, float]:
    """All figures of the report; the formulas stand at the top."""
    slower_s = max(engine.one_core_s, learner.one_core_s)
    base = modes[SYNCHRONOUS]
    speedup, ceiling = base.wall_s / modes[PARTIAL].wall_s, base.batch_s / slower_s
    return {
        "speedup_async_over_sync": speedup,
        "ceiling": ceiling,
        "share_of_ceiling": speedup / ceiling,
        "ideal_from_rates": (engine.two_cores_s + learner.two_cores_s) / slower_s,
        "idle/trainer": modes[PARTIAL].trainer_idle,
        "idle/rollout": modes[PARTIAL].rollout_idle,
        "engine/one_core_s": engine.one_core_s,
        "engine/two_cores_s": engine.two_cores_s,
        "learner/one_core_s": learner.one_core_s,
        "learner/two_cores_s": learner.two_cores_s,
        **{
            f"{mode}/{name}": value
            for mode, found in modes.items()
            for name, value in {
                "wall_s": found.wall_s,
                "batch_s": found.batch_s,
                "speedup": base.wall_s / found.wall_s,
                "idle/trainer": found.trainer_idle,
                "idle/rollout": found.rollout_idle,
                "staleness/mean": found.staleness,
                "weights/published": float(found.published),
                "weights/pause_s": found.pause_s,
            }.items()
        },
    }


def _both_alone(sizes: Sizes, part: range, folder: Path, model_path: Path) -> dict[Side, Alone]:
    folder.mkdir()
    config = config_of(PARTIAL, sizes, folder)

    def per_batch(side: Side, cores: int) -> float:
        here = folder / f"{side}-{cores}"
        return seconds_alone(side, config, model_path, part=part, cores=cores, folder=here) / len(part)

    return {side: Alone(one_core_s=per_batch(side, 1), two_cores_s=per_batch(side, CORES)) for side in SIDES}


def _table(
    sizes: Sizes, modes: Mapping[str, ModeFigures], alone: Mapping[Side, Alone], figures: Mapping[str, float]
) -> str:
    rollouts = sizes.steps * sizes.prompts * sizes.group_size
    lines = [
        f"{rollouts:,} rollouts in {sizes.steps} batches",
        f"{'alone':<14}{'s/batch, 1 core':>18}{'2 cores':>10}",
        *(f"{side:<14}{found.one_core_s:>18.3f}{found.two_cores_s:>10.3f}" for side, found in alone.items()),
        f"{'mode':<14}{'s':>8}{'s/batch':>10}{'speed-up':>10}{'trainer idle':>14}{'rollout idle':>14}{'staleness':>11}",
    ]
    for mode, found in modes.items():
        lines.append(
            f"{mode:<14}{found.wall_s:>8.1f}{found.batch_s:>10.3f}{figures[f'{mode}/speedup']:>10.2f}"
            f"{found.trainer_idle:>14.2f}{found.rollout_idle:>14.2f}{found.staleness:>11.2f}"
        )
    lines.append(
        f"{PARTIAL} over {SYNCHRONOUS}: {figures['speedup_async_over_sync']:.2f} (aim {SPEEDUP_WANTED:g}), ceiling "
        f"{figures['ceiling']:.2f}, share {figures['share_of_ceiling']:.2f} (wanted {SHARE_WANTED:g}); "
        f"from rates alone, without stragglers: {figures['ideal_from_rates']:.2f}"
    )
    return "\n".join(lines)
