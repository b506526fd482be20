"""The real teacher: vLLM scores given rows as plain transformers does, and the end of it ends the run."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from rlsys.actors.cluster import ray_cluster
from rlsys.actors.teacher import RayTeacher, TeacherActor
from rlsys.config.schema import RaySection
from rlsys.errors import EngineLost, RequestRefused, TeacherFailed, WaitTimeout
from rlsys.records import RolloutGroup, TeacherScores
from rlsys.rollout.teacher import TaughtScorer, TeacherSettings, teacher_environment
from tests.builders import make_group
from tests.models.tiny_architectures import ARCHITECTURES, VOCAB_SIZE, make_folder

pytestmark = pytest.mark.engines

CONTEXT = 300  # of the model: rows longer than a block of the cache (128 tokens on CPU) and longer than a batch
SMALLER_VOCAB = 268  # of a student whose embedding is padded less
EXACT = 1e-4  # nats, float32
KV_BYTES = 128 * 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The teacher's model; the environment is the engines' own meanwhile."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    untied = ARCHITECTURES["qwen2_untied"]
    make_folder(replace(untied, config={**untied.config, "max_position_embeddings": CONTEXT}), folder)
    before = dict(os.environ)
    os.environ.update(teacher_environment(cpus=1, gpus=0))
    yield folder
    os.environ.clear()
    os.environ.update(before)


def settings_of(folder: Path, *, top_k: int, timeout_s: float = 120, **vllm: object) -> TeacherSettings:
    return TeacherSettings(
        model=str(folder),
        dtype="float32",
        top_k=top_k,
        max_tokens=CONTEXT,
        slots=8,
        start_timeout_s=300,
        timeout_s=timeout_s,
        vllm={"kv_cache_memory_bytes": KV_BYTES, **vllm},
    )


@dataclass
class Bench:
    """A running engine and the event loop that it lives in."""

    engine: Any
    run: Callable[..., Any]
    top_k: int
    student_vocab: int

    def score(self, rows: dict[str, np.ndarray]) -> list[TeacherScores | BaseException]:
        """All at once."""

        async def score_all() -> list[TeacherScores | BaseException]:
            scores = (self.engine.score(name, row) for name, row in rows.items())
            return await asyncio.gather(*scores, return_exceptions=True)

        return self.run(score_all())


@contextmanager
def running(settings: TeacherSettings, student_vocab: int) -> Iterator[Bench]:
    from rlsys.rollout.teacher_engine import TeacherEngine  # reads the environment when it is imported

    engine = TeacherEngine("teacher", settings, student_vocab)
    with asyncio.Runner() as runner:
        try:
            runner.run(engine.start())
            yield Bench(engine, runner.run, settings.top_k, student_vocab)
        finally:
            runner.run(engine.stop())


@pytest.fixture(
    scope="module",
    params=[
        # a batch smaller than most rows: they are prefilled in several parts
        pytest.param((VOCAB_SIZE, {"enable_prefix_caching": True, "max_num_batched_tokens": 96}), id="cache"),
        pytest.param((SMALLER_VOCAB, {"enable_prefix_caching": False}), id="no cache, a smaller student"),
    ],
)
def bench(folder: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    student_vocab, vllm = request.param
    with running(settings_of(folder, top_k=5, **vllm), student_vocab) as bench:
        yield bench


def row_of(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SMALLER_VOCAB, size=length, dtype=np.int32)


def reference_of(folder: Path, token_ids_T: np.ndarray) -> torch.Tensor:
    """Log-probabilities that plain transformers gives for the next token, float32 [T - 1, V]."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(token_ids_T).long()[None]).logits[0, :-1]
    return torch.log_softmax(logits, -1)


def check_scores(bench: Bench, folder: Path, token_ids_T: np.ndarray, scores: TeacherScores | BaseException) -> None:
    assert isinstance(scores, TeacherScores), scores
    reference = reference_of(folder, token_ids_T)
    own = reference.gather(-1, torch.from_numpy(token_ids_T[1:]).long()[:, None])[:, 0]
    assert scores.logprobs_T.dtype == np.float32 and scores.logprobs_T.shape == token_ids_T.shape
    assert scores.logprobs_T[0] == 0.0
    np.testing.assert_allclose(scores.logprobs_T[1:], own, atol=EXACT, rtol=0)
    values, ids = reference[:, : bench.student_vocab].topk(bench.top_k)
    assert scores.candidate_ids_TK.dtype == np.int32
    assert scores.candidate_ids_TK.shape == (len(token_ids_T), bench.top_k)
    assert not scores.candidate_ids_TK[0].any() and not scores.candidate_logprobs_TK[0].any()
    np.testing.assert_array_equal(scores.candidate_ids_TK[1:], ids)
    np.testing.assert_allclose(scores.candidate_logprobs_TK[1:], values, atol=EXACT, rtol=0)


def test_scores_are_those_of_a_plain_forward_also_at_the_models_full_context(bench, folder):
    rows = {"short": row_of(2, 0), "middle": row_of(97, 1), "full": row_of(CONTEXT, 2)}
    for row, scores in zip(rows.values(), bench.score(rows), strict=True):
        check_scores(bench, folder, row, scores)


def test_rows_that_share_a_prefix_are_scored_whole(bench, folder):
    shared = row_of(200, 3)
    rows = {f"tail{seed}": np.concatenate([shared, row_of(60, seed)]) for seed in (4, 5)}
    for name, row in rows.items():  # one after the other, and the first one again: what a cache holds is asked for
        [scores] = bench.score({name: row})
        check_scores(bench, folder, row, scores)
    [again] = bench.score({"again": rows["tail4"]})
    check_scores(bench, folder, rows["tail4"], again)


def test_candidates_beyond_the_students_vocabulary_are_among_the_likeliest_here(folder):
    """Else the engine with the smaller student would prove nothing."""
    _, ids = reference_of(folder, row_of(CONTEXT, 2)).topk(5)
    assert (ids >= SMALLER_VOCAB).any()


def test_a_row_that_the_teacher_cannot_read_is_refused_and_the_engine_goes_on(bench, folder):
    rows = {"long": row_of(CONTEXT + 1, 6), "alien": np.array([3, VOCAB_SIZE, 4], dtype=np.int32), "fine": row_of(9, 7)}
    too_long, alien, scores = bench.score(rows)
    assert isinstance(too_long, RequestRefused) and "long" in str(too_long) and "teacher" in str(too_long)
    assert isinstance(alien, RequestRefused) and "alien" in str(alien)
    check_scores(bench, folder, rows["fine"], scores)


def test_a_teacher_that_hangs_costs_the_rollouts_on_it_and_one_that_dies_is_lost(folder):
    others, row = multiprocessing.active_children(), row_of(50, 8)
    with running(settings_of(folder, top_k=0, timeout_s=6), VOCAB_SIZE) as bench:
        (process,) = [child for child in multiprocessing.active_children() if child not in others]
        [scores] = bench.score({"before": row})
        check_scores(bench, folder, row, scores)
        os.kill(process.pid, signal.SIGSTOP)
        hung = bench.score({"h0": row, "h1": row})
        assert [type(outcome) for outcome in hung] == [WaitTimeout] * 2
        assert "waited 6 s for the scores of h0 on engine teacher" in str(hung[0])
        os.kill(process.pid, signal.SIGCONT)
        [scores] = bench.score({"after": row})
        check_scores(bench, folder, row, scores)
        os.kill(process.pid, signal.SIGKILL)
        for name in ("dying", "dead"):
            [outcome] = bench.score({name: row})
            assert isinstance(outcome, EngineLost) and "engine teacher" in str(outcome)


class OnePointEach:
    """A reward scorer that takes no time."""

    async def score(self, group: RolloutGroup) -> RolloutGroup:
        return replace(group, rollouts=tuple(replace(rollout, reward=1.0) for rollout in group.rollouts))


def test_a_teacher_whose_actor_is_killed_ends_the_run_by_name(folder):
    settings = settings_of(folder, top_k=2, timeout_s=20)
    environment = {"env_vars": teacher_environment(cpus=1, gpus=0)}
    group = make_group(0, [[0] * 150] * 8)

    async def score_for_ever(scorer: TaughtScorer, scored: asyncio.Event) -> None:
        while True:
            taught = await scorer.score(group)
            assert [r.teacher and r.teacher.candidate_ids_TK.shape for r in taught.rollouts] == [(152, 2)] * 8
            scored.set()

    async def kill_while_it_scores() -> None:
        actor = (
            ray.remote(TeacherActor)
            .options(num_cpus=0, max_concurrency=16, runtime_env=environment)
            .remote("teacher-0", settings, str(folder))
        )
        teacher = RayTeacher("teacher-0", actor)
        await teacher.start()
        scored = asyncio.Event()
        scorer = TaughtScorer(OnePointEach(), teacher, slots=8, timeout_s=20)
        scoring = asyncio.create_task(score_for_ever(scorer, scored))
        async with asyncio.timeout(60):
            await scored.wait()
            ray.kill(actor)
            await scoring

    with (
        ray_cluster(RaySection(dashboard=False), "test-teacher"),
        pytest.raises(TeacherFailed, match="teacher-0 died"),
    ):
        asyncio.run(kill_while_it_scores())
