"""`rlsys bench overlap`: lengths that belong to their rollouts, the same work in every mode, the ceiling's formula."""

import asyncio
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.bench import overlap
from rlsys.bench.fixed_lengths import FixedLengths, answer_length, parity
from rlsys.bench.overlap import SIZES, Rates, figures_of
from rlsys.bench.overlap_runs import MODES, ModeFigures, batches_of, config_of, inputs_of, lengths_of, mode_figures
from rlsys.bench.overlap_runs import make_model as make_bench_model
from rlsys.errors import RlsysError
from rlsys.records import Probe, Version, WeightVersion
from rlsys.rollout.engine import GenerateRequest
from rlsys.rollout.sim_engine import SimEngine
from rlsys.sim.clock import VirtualClock

LONGEST = 400
IDS = [f"sums:{index}:0#0/{member}" for index in range(2500) for member in range(8)]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("overlap") / "model"
    make_bench_model(path, SIZES)
    return path


def test_half_of_the_answers_have_sixteen_tokens_and_one_in_a_hundred_more_than_256():
    lengths = sorted(answer_length(rollout_id, LONGEST) for rollout_id in IDS)
    assert median(lengths) == pytest.approx(16, abs=1)
    assert len([length for length in lengths if length > 256]) / len(lengths) == pytest.approx(0.01, abs=0.003)
    # log-normal: as far below the median as above it, so 1 token where 256 stands on the other side
    assert lengths[len(lengths) // 100] == 1


@given(st.text(max_size=40), st.integers(1, 1000))
def test_an_answer_has_at_least_one_token_and_at_most_the_limit(rollout_id, longest):
    length = answer_length(rollout_id, longest)
    assert 1 <= length <= longest
    assert length == min(longest, answer_length(rollout_id, 10**9))


def test_a_length_is_the_same_in_another_process():
    code = (
        "from rlsys.bench.fixed_lengths import answer_length as f; print([f(f'sums:0:{i}#0/2', 400) for i in (3, 4)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    here = [answer_length(f"sums:0:{index}#0/2", 400) for index in (3, 4)]
    assert done.stdout.strip() == str(here) and here[0] == 61


def test_the_engine_samples_as_many_tokens_as_the_rollout_is_to_have():
    async def play() -> list[int]:
        probe = Probe(token_ids=(), logprobs=())
        version = Version(incarnation=0, step=0)
        await engine.load_weights(
            WeightVersion(version=version, segment="s", tensors=(), probe=probe, previous_probe=None)
        )
        assert engine.version == version
        requests = [
            GenerateRequest(request_id=f"{name}:0", token_ids=[1], max_tokens=LONGEST, temperature=1.0, seed=5)
            for name in IDS[:50]
        ]
        turns = await asyncio.gather(*(engine.generate(request) for request in requests))
        return [len(turn.token_ids_T) for turn in turns]

    clock = VirtualClock()
    engine = FixedLengths(SimEngine("sim-0", clock, lambda request, version: [2] * 1000))
    assert clock.run(play()) == [answer_length(name, LONGEST) for name in IDS[:50]]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_the_same_questions_and_lengths(mode, model_path, tmp_path):
    config, base = config_of(mode, SIZES, tmp_path), config_of("partial", SIZES, tmp_path)
    questions = batches_of(config, inputs_of(config, model_path))
    assert questions == batches_of(base, inputs_of(base, model_path))
    assert len({prompt.group_id for batch in questions for prompt in batch}) == SIZES.steps * SIZES.prompts
    lengths = lengths_of(config, inputs_of(config, model_path))
    assert len(lengths) == SIZES.steps * SIZES.prompts * SIZES.group_size
    assert lengths[0] == answer_length(f"{questions[0][0].group_id}/0", SIZES.longest)


def test_modes_differ_in_staleness_and_in_how_weights_come_alone(tmp_path):
    def sections(mode: str) -> dict:
        tree = config_of(mode, SIZES, tmp_path).model_dump()
        del tree["run"]["name"]
        for key in ("max_staleness", "update_mode", "age_policy"):
            del tree["rollout"][key]
        return tree

    assert all(sections(mode) == sections("synchronous") for mode in MODES)


def test_threads_are_cores_of_their_side(tmp_path):
    config = config_of("synchronous", SIZES, tmp_path, engine_threads=1, learner_threads=2)
    assert (config.rollout.cpus_per_replica, config.train.cpus_per_rank) == (1, 2)


def test_on_both_cores_a_side_has_as_many_threads_as_it_is_faster_with(monkeypatch, tmp_path):
    alone = {("engine", 1): 1.0, ("engine", 2): 1.1, ("learner", 1): 1.0, ("learner", 2): 0.6}

    def seconds(sides, *_):
        return {side: 0.2 if len(sides) == 2 else alone[side, cores.threads] for side, cores in sides.items()}

    monkeypatch.setattr(overlap, "_seconds", seconds)
    threads = {"engine": (1, 2), "learner": (1, 2)}
    found = overlap._rates(SIZES, tmp_path, tmp_path, threads=threads)
    assert found["engine"] == Rates(one_core_s=0.2, two_cores_s=1.0, threads=1)
    assert found["learner"] == Rates(one_core_s=0.2, two_cores_s=0.6, threads=2)


def test_of_what_was_measured_before_and_after_the_runs_the_faster_time_counts():
    before, after = Rates(one_core_s=1.0, two_cores_s=0.7, threads=2), Rates(one_core_s=1.5, two_cores_s=0.5, threads=2)
    assert before.faster(after) == after.faster(before) == Rates(one_core_s=1.0, two_cores_s=0.5, threads=2)


def _steps() -> list[dict[str, float]]:
    """Two steps of 2 s, the first of which was booked 5 s after the process began."""
    return [
        {"time_s": 5.0, "timing_s/step": 2.0, "weights/pause_s": 0.1},
        {"time_s": 7.0, "timing_s/step": 2.0, "weights/pause_s": 0.3},
    ]


def _result(rollouts: int, tokens_per_s: float) -> dict[str, float]:
    return {
        "rollouts": rollouts,
        "tokens_per_s": tokens_per_s,
        "wall_s": 4.5,  # with a checkpoint of half a second
        "idle/trainer": 0.2,
        "idle/rollout": 0.1,
        "staleness/mean": 1.5,
        "weights/published": 3.0,
    }


def test_a_run_lasts_from_its_first_question_to_its_last_commit():
    found = mode_figures(_steps(), _result(3, 18 / 4.5), [10, 5, 3])
    assert found.wall_s == pytest.approx(4.0) and found.batch_s == pytest.approx(2.0)
    assert (found.trainer_idle, found.rollout_idle, found.staleness, found.published) == (0.2, 0.1, 1.5, 3)
    assert found.pause_s == pytest.approx(0.2)


@pytest.mark.parametrize("result", [_result(2, 18 / 4.5), _result(3, 17 / 4.5)])
def test_a_run_that_did_other_work_is_refused(result):
    with pytest.raises(RlsysError, match="wanted 3 of 18"):
        mode_figures(_steps(), result, [10, 5, 3])


def _mode(batch_s: float, idle: float = 0.0) -> ModeFigures:
    return ModeFigures(
        wall_s=10 * batch_s,
        batch_s=batch_s,
        trainer_idle=idle,
        rollout_idle=idle / 2,
        staleness=1.0,
        published=10,
        pause_s=0.1,
    )


def test_the_ceiling_is_one_side_after_the_other_on_both_cores_over_the_slower_one_on_a_core():
    modes = {
        "synchronous": _mode(3.0),
        "one_step_off": _mode(2.4),
        "asynchronous": _mode(2.0),
        "partial": _mode(1.5, 0.2),
    }
    figures = figures_of(
        modes,
        engine=Rates(one_core_s=1.2, two_cores_s=1.9, threads=1),
        learner=Rates(one_core_s=1.0, two_cores_s=0.5, threads=2),
    )
    assert figures["speedup_async_over_sync"] == pytest.approx(3.0 / 1.5)
    assert figures["ceiling"] == pytest.approx((1.9 + 0.5) / 1.2)
    assert figures["share_of_ceiling"] == pytest.approx(2.0 / 2.0)
    assert figures["slower_to_partial"] == pytest.approx(1.2 / 1.5)
    assert (figures["idle/trainer"], figures["idle/rollout"]) == (0.2, 0.1)
    assert figures["one_step_off/speedup"] == pytest.approx(3.0 / 2.4)
    assert figures["synchronous/speedup"] == 1.0 and figures["asynchronous/wall_s"] == pytest.approx(20.0)


def test_rewards_differ_by_what_is_answered():
    assert parity("", "a", "") == 1.0 and parity("", "aa", "") == 0.0 and parity("", "", "") == 0.0
