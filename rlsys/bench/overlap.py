"""``rlsys bench overlap``: what it gains that rollouts and training go on at once, on two cores.

The same questions, answers of the same lengths and the same optimizer steps, on real engines, in four modes:

    synchronous     a batch is sampled, trained and published, then the next one; each side has both cores, the learner
                    as many threads as it is faster with by itself, the engine one or two, whichever run is faster
    one_step_off    one batch is sampled while the one before is trained, a core each; rollouts under way end before new
                    weights come, and new ones wait meanwhile
    asynchronous    the same, up to four batches ahead
    partial         the same, but that rollouts under way go on under the new weights, their KV computed again

A synchronous batch waits for its longest answer, with the engine nearly empty, and one side stands still while the
other one works: all that it has instead is the second core, which makes neither side twice as fast. The ceiling is what
the rates of the two sides alone promise, if overlapping cost nothing. From the same list and the same run:

    ceiling           = (engine's + learner's seconds, both cores each, batch by batch)
                        / max(engine's, learner's seconds, a core each); a batch
    share_of_ceiling  = speedup_async_over_sync / ceiling,  the speed-up being that of ``partial``
    slower_to_partial = max(engine's, learner's seconds, a core each) / seconds of a batch of ``partial``

where the sides were measured without anything between them. On both cores each side has the machine for itself, with
one thread or with two, whichever is faster, and the engine is given a batch when the one before has ended: what a
synchronous run does. On a core each they work at once, as they do when they overlap: cores share caches and the way to
the memory, and on some machines two busy ones are a quarter slower than one; the engine has as many rollouts in hand as
in a run. Machines get faster and slower in minutes, those that are shared by a quarter and more: so what the figures
are made of is measured twice, some minutes apart, the sides before and after the runs, and the faster time counts.

A synchronous run pays for the controller on top of its rates, step by step, and an overlapping one beside them: so the
share may be above 1 though a batch of ``partial`` takes longer than its slower side, as ``slower_to_partial`` tells.
The gain is largest where both sides need about the same time on a core, but then nothing is left for the controller,
the rewards and the contexts that are computed again. The sizes are so chosen that the engine needs more. Before the
first batch there is nothing to train, and during the last one nothing to sample: that alone costs some per cent, the
fewer the more batches there are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlsys.bench.overlap_runs import (
    ASYNCHRONOUS,
    CORES,
    MODES,
    ONE_STEP_OFF,
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
from rlsys.bench.sides import SIDES, Cores, Side, measure_sides, on_cores

# Few slots, as an engine has whose cache is small: it samples for longer than the learner trains, and at every new
# version few contexts are computed again. Many batches: the first one and the last one overlap with nothing.
SIZES = Sizes(steps=24, prompts=8, group_size=8, slots=8, longest=400, tokens_per_microbatch=4096, width=256, layers=6)
BOTH = tuple(range(CORES))
AT_ONCE: Mapping[Side, Cores] = {
    side: Cores(which=(core,), threads=1, by_batch=False) for core, side in enumerate(SIDES)
}
RUNS = (  # mode, threads of the engine
    (SYNCHRONOUS, 1),
    (ONE_STEP_OFF, 1),
    (PARTIAL, 1),
    (SYNCHRONOUS, 2),
    (ASYNCHRONOUS, 1),
    (PARTIAL, 1),
)
SHARE_WANTED, SPEEDUP_WANTED = 0.9, 1.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Seconds of one side for a batch.

    Attributes:
        one_core_s: on a core, while the other side works on the other one.
        two_cores_s: alone on both cores, batch by batch, with ``threads``.
        threads: with which it is faster there. Small models are often slower with two.
    """

    one_core_s: float
    two_cores_s: float
    threads: int

    def faster(self, other: Rates) -> Rates:
        """Of two measurements with as many threads."""
        return replace(
            self,
            one_core_s=min(self.one_core_s, other.one_core_s),
            two_cores_s=min(self.two_cores_s, other.two_cores_s),
        )


def measure(sizes: Sizes = SIZES) -> Report:
    """Figures: the three of the formulas above; ``idle/trainer`` and ``idle/rollout`` of the partial mode;
    ``<mode>/...``; and of each side by itself the seconds a batch, ``engine/one_core_s`` and so on.

    Raises:
        ConfigError: the machine has not two cores.
        RlsysError: a run failed.
    """
    with on_cores(BOTH), tempfile.TemporaryDirectory(prefix="rlsys-overlap-") as name:
        root, model_path = Path(name), Path(name) / "model"
        make_model(model_path, sizes)
        before = _rates(sizes, root / "before", model_path, threads=dict.fromkeys(SIDES, (1, 2)))
        learner_threads = before["learner"].threads
        runs: dict[str, list[ModeFigures]] = {mode: [] for mode in MODES}
        for number, (mode, engine_threads) in enumerate(RUNS):
            threads = {"engine_threads": engine_threads, "learner_threads": learner_threads}
            config = config_of(mode, sizes, root / str(number), **(threads if mode == SYNCHRONOUS else {}))
            runs[mode].append(run_mode(config, inputs_of(config, model_path)))
        only = {side: (found.threads,) for side, found in before.items()}
        after = _rates(sizes, root / "after", model_path, threads=only)
    rates = {side: found.faster(after[side]) for side, found in before.items()}
    modes = {mode: min(found, key=lambda figures: figures.wall_s) for mode, found in runs.items()}
    figures = figures_of(modes, **rates)
    return Report(figures=figures, table=_table(sizes, modes, rates, figures))


def figures_of(modes: Mapping[str, ModeFigures], *, engine: Rates, learner: Rates) -> dict[str, float]:
    """All figures of the report; the formulas stand at the top."""
    slower_s = max(engine.one_core_s, learner.one_core_s)
    base = modes[SYNCHRONOUS]
    speedup = base.wall_s / modes[PARTIAL].wall_s
    ceiling = (engine.two_cores_s + learner.two_cores_s) / slower_s
    return {
        "speedup_async_over_sync": speedup,
        "ceiling": ceiling,
        "share_of_ceiling": speedup / ceiling,
        "slower_to_partial": slower_s / modes[PARTIAL].batch_s,
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


def _rates(sizes: Sizes, folder: Path, model_path: Path, *, threads: Mapping[Side, Sequence[int]]) -> dict[Side, Rates]:
    """On both cores with whichever number of those threads is the fastest."""
    at_once = _seconds(AT_ONCE, sizes, folder, model_path)

    def alone(side: Side, number: int) -> float:
        sides = {side: Cores(which=BOTH, threads=number, by_batch=True)}
        return _seconds(sides, sizes, folder.with_name(f"{folder.name}-{side}-{number}"), model_path)[side]

    rates = {}
    for side in SIDES:
        two_cores_s, number = min((alone(side, number), number) for number in threads[side])
        rates[side] = Rates(one_core_s=at_once[side], two_cores_s=two_cores_s, threads=number)
    return rates


def _seconds(sides: Mapping[Side, Cores], sizes: Sizes, folder: Path, model_path: Path) -> dict[Side, float]:
    """A batch."""
    found = measure_sides(sides, config_of(PARTIAL, sizes, folder), model_path, folder=folder)
    return {side: seconds / sizes.steps for side, seconds in found.items()}


def _table(
    sizes: Sizes, modes: Mapping[str, ModeFigures], rates: Mapping[Side, Rates], figures: Mapping[str, float]
) -> str:
    rollouts = sizes.steps * sizes.prompts * sizes.group_size
    lines = [
        f"{rollouts:,} rollouts in {sizes.steps} batches",
        f"{'s/batch':<14}{'a core each':>12}{'both cores':>12}{'with threads':>14}",
        *(
            f"{side:<14}{found.one_core_s:>12.3f}{found.two_cores_s:>12.3f}{found.threads:>14}"
            for side, found in rates.items()
        ),
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
        f"slower side over a batch of {PARTIAL}: {figures['slower_to_partial']:.2f}"
    )
    return "\n".join(lines)
