"""On-policy distillation: another model scores the student's own rollouts. Imports without vllm.

Legend of dimension suffixes: T tokens of one rollout, K candidates at each place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rlsys.errors import EngineLost, RequestRefused, TeacherFailed, WaitTimeout
from rlsys.records import DropCause, Rollout, RolloutGroup, TeacherScores
from rlsys.rollout.play import greedy_id
from rlsys.rollout.vllm_settings import engine_environment

GRACE_S = 5.0  # what an answer may take beyond the engine's own deadline: messages, a loaded machine
MAX_FAILURES_IN_A_ROW = 64  # rollouts without an answer, one after another, before the run gives up

# engine arguments that follow from other keys or carry the scoring, and where they come from
_CONTRACT = "part of how rlsys drives a teacher; it cannot be changed"
OWNED_ARGUMENTS = {
    "model": "teacher.path",
    "tokenizer": "teacher.path",
    "max_num_seqs": "teacher.slots",
    "max_model_len": "derived from the longest prompt and rollout.max_tokens",
    "max_logprobs": "teacher.top_k",
    "logprobs_mode": _CONTRACT,
    "worker_extension_cls": _CONTRACT,
}
WORKER = "rlsys.rollout.teacher_worker.WorkerExtension"

KV_CACHE_BYTES_ON_CPU = 512 * 2**20  # rows wait for room; a row alone must fit


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSettings:
    """How a teacher's engine is brought up, and what it is asked.

    Attributes:
        model: Hugging Face folder.
        dtype: precision of the weights, where ``vllm`` names none.
        top_k: candidates at each place; 0: only the token that stands there.
        max_tokens: longest rollout, prompt and answer together.
        slots: most rollouts at once.
        start_timeout_s: deadline for the engine to come up, seconds.
        timeout_s: deadline of one rollout, seconds.
        vllm: further engine arguments, passed through (config key ``teacher.vllm``).

    Example:
        >>> TeacherSettings(model="m", dtype="float32", top_k=8, max_tokens=512, slots=4, start_timeout_s=600,
        ...                 timeout_s=300).arguments(on_cpu=True)["max_model_len"]
        513
    """

    model: str
    dtype: str
    top_k: int
    max_tokens: int
    slots: int
    start_timeout_s: float
    timeout_s: float
    vllm: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self, *, on_cpu: bool) -> dict[str, Any]:
        """Keywords of vLLM's ``AsyncEngineArgs``."""
        defaults: dict[str, Any] = {
            "dtype": self.dtype,
            "enforce_eager": on_cpu,  # on CPU compiling takes over a minute and gains nothing
            "disable_log_stats": True,
            # on CPU vLLM would else take a share of the whole memory
            **({"kv_cache_memory_bytes": KV_CACHE_BYTES_ON_CPU} if on_cpu else {}),
        }
        owned: dict[str, Any] = {
            "model": self.model,
            "max_num_seqs": self.slots,
            "max_model_len": self.max_tokens + 1,  # room for the token that vLLM samples
            "max_logprobs": -1,  # no limit of vLLM's: ``num_asked`` is bounded already
            "logprobs_mode": "raw_logprobs",
            "worker_extension_cls": WORKER,
        }
        return {**defaults, **self.vllm, **owned}


def teacher_environment(*, cpus: float, gpus: float) -> dict[str, str]:
    """Environment variables that a teacher's process needs before it imports vllm; the arguments are those of
    ``engine_environment``."""
    environment = engine_environment(cpus=cpus, gpus=gpus)
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would overrule kv_cache_memory_bytes
    # Scoring asks for one token more than the row, since vLLM samples at least one. It is never fed back, so that no
    # position beyond the model's context is computed; vLLM looks at the lengths alone.
    return environment | {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}


def num_asked(top_k: int, *, student_vocab: int, teacher_vocab: int) -> int:
    """How many candidates to ask the engine for, so that ``top_k`` of them exist for the student.

    Models with one tokenizer may have embeddings padded to different sizes. The rows beyond the student's may all be
    among the likeliest: nothing has ever taught them to be unlikely.
    """
    return top_k + max(0, teacher_vocab - student_vocab) if top_k else 0


def read_scores(
    token_ids_T: NDArray[np.int32],
    flat_ids: Sequence[int],
    flat_logprobs: Sequence[float],
    *,
    top_k: int,
    student_vocab: int,
) -> TeacherScores:
    """What vLLM's flat log-probabilities of a prompt say.

    Args:
        token_ids_T: the row that was scored.
        flat_ids, flat_logprobs: for each place but the first, one after another: the token that stands there, then the
            likeliest tokens, likeliest first (the token that stands there may be one of them). Logprobs in nats.
        top_k: candidates to keep at each place.
        student_vocab: candidates from here on do not exist for the student and are left out.

    Raises:
        ValueError: they are not of this row, or hold too few candidates.
        RequestRefused: a log-probability is not finite.
    """
    num_places = len(token_ids_T) - 1
    width, rest = divmod(len(flat_ids), num_places) if num_places else (top_k + 1, len(flat_ids))
    ids = np.asarray(flat_ids, dtype=np.int32)
    logprobs = np.asarray(flat_logprobs, dtype=np.float32)
    if rest or width < top_k + 1 or ids.shape != logprobs.shape:
        raise ValueError(f"{ids.size} ids and {logprobs.size} log-probabilities for {num_places} places and {top_k=}")
    ids, logprobs = ids.reshape(num_places, width), logprobs.reshape(num_places, width)
    if not np.array_equal(ids[:, 0], token_ids_T[1:]):
        raise ValueError("the log-probabilities are of other tokens than those of the row")
    candidate_ids, candidate_logprobs = _likeliest(ids[:, 1:], logprobs[:, 1:], top_k, student_vocab)
    if not (np.isfinite(logprobs[:, 0]).all() and np.isfinite(candidate_logprobs).all()):
        raise RequestRefused("the teacher's log-probabilities are not finite")
    return TeacherScores(
        logprobs_T=_after_first(logprobs[:, 0]),
        candidate_ids_TK=_after_first(candidate_ids),
        candidate_logprobs_TK=_after_first(candidate_logprobs),
    )


def _likeliest(
    ids: NDArray[np.int32], logprobs: NDArray[np.float32], top_k: int, student_vocab: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The first ``top_k`` of each row that exist for the student, in their order. Raises ValueError for too few."""
    is_alien = ids >= student_vocab
    if is_alien.any():
        order = np.argsort(is_alien, axis=1, kind="stable")
        ids, logprobs = np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprobs, order, axis=1)
    if (ids[:, :top_k] >= student_vocab).any():
        raise ValueError(f"fewer than {top_k=} candidates below {student_vocab}")
    return ids[:, :top_k], logprobs[:, :top_k]


def _after_first(values: NDArray[Any]) -> NDArray[Any]:
    """With zeros for the first place, which nothing predicts: one row more."""
    return np.concatenate([np.zeros_like(values, shape=(1, *values.shape[1:])), values])


class Teacher(Protocol):
    async def score(self, rollout_id: str, token_ids_T: NDArray[np.int32]) -> TeacherScores:
        """Raises RequestRefused or WaitTimeout (this rollout gets no scores), EngineLost or TeacherFailed."""
        ...


class RewardScorer(Protocol):
    async def score(self, group: RolloutGroup) -> RolloutGroup: ...


class TaughtScorer:
    """Rewards and teacher's scores for every rollout of a group, both at the same time.

    Args:
        scorer: gives the rewards.
        slots: most rollouts at once on the teacher, over all groups.
        timeout_s: the teacher's own deadline for a rollout. It counts from when the rollout has its slot; since every
            use of a slot has one, the wait for a slot ends too.
    """

    def __init__(
        self, scorer: RewardScorer, teacher: Teacher, *, slots: int, timeout_s: float, grace_s: float = GRACE_S
    ) -> None:
        self._scorer, self._teacher = scorer, teacher
        self._slots = asyncio.Semaphore(slots)
        self._limit_s = timeout_s + grace_s
        self._failures: list[str] = []  # since the last answer

    async def score(self, group: RolloutGroup) -> RolloutGroup:
        """A rollout that the teacher has no scores for leaves with its cause, and its reward with it.

        Raises:
            TeacherFailed: the teacher is dead, or gave no scores for many rollouts one after another.
            RlsysError: whatever else ``scorer`` raises.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                rewards = tasks.create_task(self._scorer.score(group))
                lessons = {
                    rollout.rollout_id: tasks.create_task(self._ask(rollout, group.group_id))
                    for rollout in group.rollouts
                    if rollout.rollout_id != greedy_id(group.group_id)  # never trained
                }
        except BaseExceptionGroup as failures:  # the others were cancelled for the first one
            raise failures.exceptions[0] from None
        return _with_lessons(rewards.result(), {name: lesson.result() for name, lesson in lessons.items()})

    async def _ask(self, rollout: Rollout, group_id: str) -> TeacherScores | str:
        """The teacher's scores, or why there are none."""
        async with self._slots:
            deadline = asyncio.timeout(self._limit_s)
            try:
                async with deadline:
                    scores = await self._teacher.score(rollout.rollout_id, rollout.token_ids_T)
            except (RequestRefused, WaitTimeout) as error:
                return self._failed(str(error))
            except EngineLost as error:
                raise TeacherFailed(f"the teacher cannot go on: {error}") from error
            except TimeoutError:
                if not deadline.expired():
                    raise
                # it passed a deadline of its own: nothing runs there any more
                raise TeacherFailed(str(WaitTimeout(f"the teacher to score {group_id}", self._limit_s))) from None
        self._failures.clear()
        return scores

    def _failed(self, why: str) -> str:
        self._failures.append(why)
        if len(self._failures) >= MAX_FAILURES_IN_A_ROW:
            first, number = self._failures[0], len(self._failures)
            raise TeacherFailed(f"the teacher scored none of {number} rollouts in a row. The first: {first}")
        return why


def _with_lessons(group: RolloutGroup, lessons: Mapping[str, TeacherScores | str]) -> RolloutGroup:
    taught = []
    for rollout in group.rollouts:
        lesson = lessons.get(rollout.rollout_id)
        taught.append(replace(rollout, teacher=lesson) if isinstance(lesson, TeacherScores) else rollout)
    group = replace(group, rollouts=tuple(taught))
    scored = group
    for rollout_id, lesson in lessons.items():
        if isinstance(lesson, str):
            group = group.drop({rollout_id: DropCause.TEACHER_FAILED}, lesson)
    # their rewards were never shaped, and may not be compared with those that will be
    return replace(group, dropped_rewards=scored.dropped_rewards, dropped_parts=scored.dropped_parts)
