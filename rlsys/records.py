"""The records that travel through rlsys, in the order of one datum's way. numpy only: no torch, no ray.

Legend of dimension suffixes: T tokens of one rollout, G rollouts of one group.

Everything per token is aligned to the token it describes: ``behaviour_logprobs_T[t]`` is the log-probability with which
``token_ids_T[t]`` was sampled. The shift by one for next-token prediction happens once, in ``train/``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

NOT_SAMPLED = -1  # version code of a token that no engine sampled (prompt and environment tokens)
_INCARNATION_SHIFT = 32  # a version code holds the step in its lower 32 bits


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Version:
    """A policy version: ``step`` trained batches in the ``incarnation``-th life of the run.

    Example:
        >>> str(Version(incarnation=0, step=17)), Version.parse("0.17").step
        ('0.17', 17)
    """

    incarnation: int
    step: int

    def __post_init__(self) -> None:
        if self.incarnation < 0 or self.step < 0:
            raise ValueError(f"version parts must be >= 0, got {self.incarnation}.{self.step}")

    def __str__(self) -> str:
        return f"{self.incarnation}.{self.step}"

    @classmethod
    def parse(cls, text: str) -> Version:
        """Read ``"incarnation.step"``. Raises ValueError on anything else."""
        incarnation, step = text.split(".")
        return cls(incarnation=int(incarnation), step=int(step))

    @property
    def code(self) -> int:
        """This version as one int64, the form in which tokens carry it (``versions_T``)."""
        return (self.incarnation << _INCARNATION_SHIFT) | self.step

    @classmethod
    def from_code(cls, code: int) -> Version:
        return cls(incarnation=int(code) >> _INCARNATION_SHIFT, step=int(code) & 0xFFFFFFFF)

    def next(self) -> Version:
        return Version(incarnation=self.incarnation, step=self.step + 1)


START = Version(incarnation=0, step=0)  # of a new run


def steps_of(versions_T: NDArray[np.int64]) -> NDArray[np.int64]:
    """Step of each version code; ``NOT_SAMPLED`` stays as it is. Shape [T] to [T]."""
    return np.where(versions_T == NOT_SAMPLED, NOT_SAMPLED, versions_T & 0xFFFFFFFF)


class StopReason(Enum):
    """Why a rollout ended."""

    EOS = "eos"  # the model ended its answer
    LENGTH = "length"  # the token limit was reached
    ENV = "env"  # the environment ended the conversation
    INTERRUPTED = "interrupted"  # the engine let it go before its end: it goes on elsewhere


class DropCause(Enum):
    """Why a rollout left without being trained."""

    TOO_STALE = "too_stale"  # older than rollout.max_staleness when it was to be trained
    STOPPED = "stopped"  # still under way when the version that began it was too old for every batch to come
    ENGINE_LOST = "engine_lost"  # its engine died, hung or failed a weight probe
    ENGINE_REFUSED = "engine_refused"  # the engine refused the request (for example a prompt beyond its context)
    EMPTY = "empty"  # it holds no sampled token
    REWARD_ERROR = "reward_error"  # the reward function raised, or returned something that is no number
    REWARD_TIMEOUT = "reward_timeout"  # the reward function passed its deadline
    REWARD_CRASH = "reward_crash"  # the process of the reward function died
    GROUP_TOO_SMALL = "group_too_small"  # fewer than two rollouts of its group were left
    TEACHER_FAILED = "teacher_failed"  # the teacher gave no log-probabilities of its tokens
    BASELINE = "baseline"  # a greedy rollout: its reward is its group's baseline, and it is never trained
    FILTERED = "filtered"  # a row of algo.selection took it out


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """One draw of a question: which source, which question of it, which epoch. The unit of 'exactly once' (law 5)."""

    source: str
    index: int
    epoch: int

    def __str__(self) -> str:
        return f"{self.source}:{self.epoch}:{self.index}"


Message = Mapping[str, str]  # {"role": ..., "content": ...}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One question.

    Attributes:
        draw: which draw this is.
        content: plain text, or chat messages.
        answer: the reference answer; None where the data has none.
        fields: the other columns of the data, handed to the reward function by name.
        attempt: how often this draw was requeued before.

    Example:
        >>> Prompt(draw=Draw(source="sums", index=3, epoch=0), content="12+34=", answer="46").group_id
        'sums:0:3#0'
    """

    draw: Draw
    content: str | tuple[Message, ...]
    answer: Any = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    attempt: int = 0

    @property
    def group_id(self) -> str:
        return f"{self.draw}#{self.attempt}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What an engine sampled in answer to one request: tokens, their log-probabilities, and who sampled each.

    Attributes:
        token_ids_T: int32 [T], sampled tokens, the end-of-sequence token included.
        behaviour_logprobs_T: float32 [T], nats, under the sampling distribution (after temperature).
        versions_T: int64 [T], version codes stamped by the engine.
        stop_reason: EOS or LENGTH; INTERRUPTED for the beginning of an answer.
    """

    token_ids_T: NDArray[np.int32]
    behaviour_logprobs_T: NDArray[np.float32]
    versions_T: NDArray[np.int64]
    stop_reason: StopReason

    def __post_init__(self) -> None:
        _check_aligned(self.token_ids_T, self.behaviour_logprobs_T, self.versions_T)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherScores:
    """What a teacher model says of a rollout's tokens, at temperature 1. K: candidates at each place, the likeliest
    tokens of the teacher, likeliest first; 0 where only what stands there counts.

    Attributes:
        logprobs_T: float32 [T], nats, of the tokens that stand there; 0 at the first one, which nothing predicts.
        candidate_ids_TK: int32 [T, K].
        candidate_logprobs_TK: float32 [T, K], nats.
    """

    logprobs_T: NDArray[np.float32]
    candidate_ids_TK: NDArray[np.int32]
    candidate_logprobs_TK: NDArray[np.float32]

    def __post_init__(self) -> None:
        shape, other = self.candidate_ids_TK.shape, self.candidate_logprobs_TK.shape
        if shape != other or len(shape) != 2 or self.logprobs_T.shape != shape[:1]:
            raise ValueError(f"teacher scores differ in shape: {self.logprobs_T.shape}, {shape} and {other}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One conversation: prompt, sampled and environment tokens in one row, token-aligned.

    Attributes:
        rollout_id: group id, '/', member index. Unique in a run.
        token_ids_T: int32 [T], prompt and everything after it.
        loss_mask_T: bool [T], True for the tokens that the policy sampled and that may be trained.
        behaviour_logprobs_T: float32 [T], nats; 0 where ``loss_mask_T`` is False.
        versions_T: int64 [T], version codes; ``NOT_SAMPLED`` where no engine sampled the token.
        num_prompt_tokens: length of the first prompt.
        completion: the text of the last answer, without special tokens.
        stop_reason: why it ended.
        reward: None means not scored yet.
        reward_parts: named parts of the reward, empty where the function gave none.
        turn_rewards: one for each turn; None where the function rewards the whole alone.
        token_rewards: one for each sampled token; None likewise.
        shaped_by: what rows of algo.shaping added: ``reward`` less this is the score that the function gave.
        teacher: None where the run has no teacher, or it has not answered yet.
        engine: name of the engine that sampled it, or the end of it where it was moved.
        seconds: wall seconds that it was played, from its first request to its end.
    """

    rollout_id: str
    token_ids_T: NDArray[np.int32]
    loss_mask_T: NDArray[np.bool_]
    behaviour_logprobs_T: NDArray[np.float32]
    versions_T: NDArray[np.int64]
    num_prompt_tokens: int
    completion: str
    stop_reason: StopReason
    engine: str
    seconds: float
    reward: float | None = None
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    turn_rewards: tuple[float, ...] | None = None
    token_rewards: tuple[float, ...] | None = None
    shaped_by: float = 0.0
    teacher: TeacherScores | None = None

    def __post_init__(self) -> None:
        _check_aligned(self.token_ids_T, self.loss_mask_T, self.behaviour_logprobs_T, self.versions_T)

    @property
    def num_sampled_tokens(self) -> int:
        return int(np.count_nonzero(self.versions_T != NOT_SAMPLED))

    @property
    def turn_ends(self) -> NDArray[np.int64]:
        """Index of the last sampled token of each turn, ascending. Between two turns stand tokens of the environment,
        at least those that open the next answer."""
        sampled_T = self.versions_T != NOT_SAMPLED
        return np.flatnonzero(sampled_T & ~np.append(sampled_T[1:], False))


@dataclass(frozen=True, kw_only=True, slots=True)
class DroppedRollout:
    """One rollout that left, and why. ``detail`` is a traceback or a sentence, empty where the cause says all."""

    rollout_id: str
    cause: DropCause
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutGroup:
    """The rollouts of one prompt. The reward of a rollout that was dropped after scoring stays in the baseline.

    Attributes:
        prompt: the question.
        rollouts: the members that still stand.
        dropped: members lost so far, with their causes.
        dropped_rewards: rewards of those members that were dropped after scoring.
        dropped_parts: the parts of each of these rewards.
        greedy_reward: of the greedy rollout; None where none was asked for, or it is not scored yet.
    """

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    dropped: tuple[DroppedRollout, ...] = ()
    dropped_rewards: tuple[float, ...] = ()
    dropped_parts: tuple[Mapping[str, float], ...] = ()
    greedy_reward: float | None = None

    @property
    def group_id(self) -> str:
        return self.prompt.group_id

    @property
    def num_members(self) -> int:
        return len(self.rollouts) + len(self.dropped)

    @property
    def baseline_rewards(self) -> tuple[float, ...]:
        """Rewards of every scored member: those of ``rollouts`` in their order, then ``dropped_rewards``."""
        standing = tuple(rollout.reward for rollout in self.rollouts if rollout.reward is not None)
        return standing + self.dropped_rewards

    def drop(self, causes: Mapping[str, DropCause], detail: str = "") -> RolloutGroup:
        """This group without the named rollouts (rollout id to cause); their rewards stay in the baseline."""
        lost = [rollout for rollout in self.rollouts if rollout.rollout_id in causes]
        scored = [rollout for rollout in lost if rollout.reward is not None]
        return replace(
            self,
            rollouts=tuple(rollout for rollout in self.rollouts if rollout.rollout_id not in causes),
            dropped=self.dropped
            + tuple(
                DroppedRollout(rollout_id=rollout.rollout_id, cause=causes[rollout.rollout_id], detail=detail)
                for rollout in lost
            ),
            dropped_rewards=self.dropped_rewards
            + tuple(rollout.reward for rollout in scored if rollout.reward is not None),
            dropped_parts=self.dropped_parts + tuple(rollout.reward_parts for rollout in scored),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One trainable sequence: a rollout's tokens with its advantages. All arrays [T], token-aligned.

    Attributes:
        weight_mask_T: bool, the tokens that carry weight in the gradient (loss mask less tokens cut for age).
        advantages_T: float32, 0 where ``weight_mask_T`` is False, and everywhere where the learner works them out.
        rewards_T: float32, the rewards on the tokens that earned them.
        greedy_reward: of its group's greedy rollout; 0 where there is none.
        is_correct: whether its score says that the answer is right.
        teacher: None where the run has no teacher.
    """

    rollout_id: str
    token_ids_T: NDArray[np.int32]
    weight_mask_T: NDArray[np.bool_]
    behaviour_logprobs_T: NDArray[np.float32]
    advantages_T: NDArray[np.float32]
    versions_T: NDArray[np.int64]
    rewards_T: NDArray[np.float32]
    greedy_reward: float
    is_correct: bool
    teacher: TeacherScores | None

    def __post_init__(self) -> None:
        per_token = (self.weight_mask_T, self.behaviour_logprobs_T, self.advantages_T, self.versions_T, self.rewards_T)
        _check_aligned(self.token_ids_T, *per_token)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one trained batch did: the version it made, and its metrics (already reduced over ranks)."""

    version: Version
    metrics: Mapping[str, float]


class TensorEntry(NamedTuple):
    """One tensor of a weight version: where its bytes lie in the segment, and what they must hash to.

    Attributes:
        dtype: torch's name without the prefix, e.g. ``float32``.
        offset, num_bytes: location in the segment, bytes.
        checksum: xxh3_64 of the bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    num_bytes: int
    checksum: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """Fixed token sequences and the learner's log-probabilities of them at a version, temperature 1.

    Attributes:
        token_ids: P sequences of T int32 tokens.
        logprobs: for each sequence float32 [T]; index 0 is 0, since nothing predicts the first token.
    """

    token_ids: tuple[NDArray[np.int32], ...]
    logprobs: tuple[NDArray[np.float32], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightVersion:
    """A published policy version: where its bytes lie, and how an engine proves that it serves them.

    Attributes:
        segment: path of the shared-memory segment.
        tensors: the manifest.
        probe: what the engine must answer once it serves this version.
        previous_probe: the same sequences under the version exported before; None for the first.
    """

    version: Version
    segment: str
    tensors: tuple[TensorEntry, ...]
    probe: Probe
    previous_probe: Probe | None

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.tensors)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """How an engine took over a version. Times in seconds; differences in nats, averages over the probe's tokens."""

    engine: str
    version: Version
    pause_s: float
    total_s: float
    probe_difference: float


def _check_aligned(first: NDArray[Any], *others: NDArray[Any]) -> None:
    if first.ndim != 1:
        raise ValueError(f"per-token arrays must be 1-D, got shape {first.shape}")
    for other in others:
        if other.shape != first.shape:
            raise ValueError(f"per-token arrays differ in shape: {first.shape} and {other.shape}")
