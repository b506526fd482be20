"""One rollout: a prompt played through an environment, on one engine from its first turn to its last. Where the engine
lets it go in its first answer, another one goes on after the tokens that are there.

A group is the same prompt played ``group_size`` times; and once more greedily, where the reward of the greedy answer is
to be the baseline. The controller puts it together (``controller/gather.py``).

Tokens in, tokens out: what was sampled is never tokenised again. A further turn's context is everything so far plus the
tokens of the environment's messages.

Legend of dimension suffixes: T tokens of one rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from os.path import commonprefix
from typing import Any

import numpy as np

from rlsys.envs.protocol import Env
from rlsys.errors import RequestRefused
from rlsys.records import (
    NOT_SAMPLED,
    DropCause,
    DroppedRollout,
    Message,
    Prompt,
    Rollout,
    StopReason,
    Turn,
    steps_of,
)
from rlsys.rollout.clock import Clock
from rlsys.rollout.engine import Engine, GenerateRequest

Tokenizer = Any  # a tokenizer of transformers; its type would import torch

GREEDY = "greedy"  # in place of a member's index
OPENINGS_KEPT = 256  # the groups that came last; a member that comes later is rendered again


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaySpec:
    """How a group is to be sampled.

    Attributes:
        group_size: number of rollouts to be trained.
        temperature: 0 means greedy.
        max_tokens: most sampled tokens per turn.
        seed: base seed; each rollout derives its own from it and its id.
        greedy_baseline: play one member more, greedily, of which only the reward is wanted.
    """

    group_size: int
    temperature: float
    max_tokens: int
    seed: int
    greedy_baseline: bool = False

    @property
    def num_members(self) -> int:
        """Rollouts that are played, the greedy one included."""
        return self.group_size + self.greedy_baseline

    @property
    def members(self) -> tuple[Member, ...]:
        names = tuple(map(str, range(self.group_size))) + (GREEDY,) * self.greedy_baseline
        return tuple(Member(name=name) for name in names)


@dataclass(frozen=True, kw_only=True, slots=True)
class PartialRollout:
    """What there was of a rollout when its engine let it go.

    Attributes:
        turn: its answer so far, perhaps without a token yet. None: it cannot go on, since its environment had taken a
            step, and stays behind with what it knows.
        seconds: wall seconds that it was played so far.
    """

    rollout_id: str
    turn: Turn | None
    seconds: float

    @property
    def oldest_step(self) -> int | None:
        """Of the versions that sampled it; None where nothing was sampled."""
        if self.turn is None or not self.turn.versions_T.size:
            return None
        return int(steps_of(self.turn.versions_T).min())


Played = Rollout | DroppedRollout | PartialRollout


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """Which rollout of a group.

    Attributes:
        name: its index, or ``GREEDY``.
        retry: how often it was lost with its engine before.
        begun: what an engine that let it go had of it; None: it begins.

    Example:
        >>> Member(name="2").rollout_id("sums:0:3#0")
        'sums:0:3#0/2'
    """

    name: str
    retry: int = 0
    begun: PartialRollout | None = None

    def rollout_id(self, group_id: str) -> str:
        return f"{group_id}/{self.name}"

    def seed(self, base: int, group_id: str) -> int:
        """A retry has a seed of its own: whatever became of the first try, it is not played over again."""
        rollout_id = self.rollout_id(group_id)
        return rollout_seed(base, f"{rollout_id}~{self.retry}" if self.retry else rollout_id)


class Player:
    """Plays rollouts on one engine, any number at once.

    Args:
        engine_name: written into the rollouts.
        make_env: a fresh environment for each rollout.
        tokenizer: renders the conversation (its chat template, where it has one) and decodes the answers.
    """

    def __init__(
        self, engine: Engine, engine_name: str, *, make_env: Callable[[], Env], tokenizer: Tokenizer, clock: Clock
    ) -> None:
        self._engine, self._engine_name = engine, engine_name
        self._make_env, self._tokenizer, self._clock = make_env, tokenizer, clock
        self._openings: dict[str, tuple[Sequence[Message] | str, list[int]]] = {}

    async def play_rollout(self, prompt: Prompt, member: Member, spec: PlaySpec) -> Played:
        """What the engine lets go comes back as partial. A rollout whose request the engine refused, or that holds no
        sampled token, comes back as dropped.

        Raises:
            EngineLost: the engine is gone, and the rollout with it.
        """
        rollout_id = member.rollout_id(prompt.group_id)
        rows = _Rows(rollout_id=rollout_id, seed=member.seed(spec.seed, prompt.group_id))
        started = self._clock.now() - (member.begun.seconds if member.begun is not None else 0.0)
        try:
            interrupted = await self._converse(prompt, rows, spec, member)
        except RequestRefused as error:
            return DroppedRollout(rollout_id=rollout_id, cause=DropCause.ENGINE_REFUSED, detail=str(error))
        if interrupted is not None:
            turn = interrupted if rows.num_turns == 0 else None
            return PartialRollout(rollout_id=rollout_id, turn=turn, seconds=self._clock.now() - started)
        if not any(rows.loss_mask):
            return DroppedRollout(rollout_id=rollout_id, cause=DropCause.EMPTY)
        return rows.rollout(self._engine_name, self._clock.now() - started)

    async def _converse(self, prompt: Prompt, rows: _Rows, spec: PlaySpec, member: Member) -> Turn | None:
        """Fill ``rows`` turn by turn until the environment, or a turn that was cut at its token limit, ends it. Returns
        the turn that the engine let go, where it did."""
        begun = member.begun.turn if member.begun is not None else None
        env = self._make_env()
        rows.add_context(self._opening_tokens(prompt.group_id, env.reset(prompt)))
        rows.num_prompt_tokens = len(rows.token_ids)
        while True:
            turn = await self._answer(rows, begun, spec, 0.0 if member.name == GREEDY else spec.temperature)
            if turn.stop_reason is StopReason.INTERRUPTED:
                return turn
            begun = None
            rows.add_turn(turn)
            rows.completion = self._tokenizer.decode(turn.token_ids_T.tolist(), skip_special_tokens=True)
            messages = await env.step(rows.completion)
            if turn.stop_reason is StopReason.LENGTH:  # an answer without an end cannot be followed by another message
                return None
            if messages is None:
                if rows.num_turns > 1:
                    rows.stop_reason = StopReason.ENV
                return None
            rows.add_context(following_tokens(self._tokenizer, messages, last_token=rows.token_ids[-1]))

    async def _answer(self, rows: _Rows, begun: Turn | None, spec: PlaySpec, temperature: float) -> Turn:
        """One answer, from its first token or after those of ``begun``; all of it is returned."""
        said = [] if begun is None else begun.token_ids_T.tolist()
        turn = await self._engine.generate(
            GenerateRequest(
                request_id=f"{rows.rollout_id}:{rows.num_turns}",
                token_ids=rows.token_ids + said,
                max_tokens=spec.max_tokens - len(said),
                temperature=temperature,
                seed=rows.request_seed(len(said)),
            )
        )
        return turn if begun is None else _joined(begun, turn)

    def _opening_tokens(self, group_id: str, opening: Sequence[Message] | str) -> list[int]:
        """Rendered once for all members of a group that begin alike."""
        kept = self._openings.get(group_id)
        if kept is None or kept[0] != opening:
            kept = (opening, opening_tokens(self._tokenizer, opening))
            self._openings[group_id] = kept
            if len(self._openings) > OPENINGS_KEPT:
                del self._openings[next(iter(self._openings))]
        return kept[1]


def _joined(begun: Turn, rest: Turn) -> Turn:
    """The beginning of an answer and what another engine sampled after it, as one."""
    return Turn(
        token_ids_T=np.concatenate([begun.token_ids_T, rest.token_ids_T]),
        behaviour_logprobs_T=np.concatenate([begun.behaviour_logprobs_T, rest.behaviour_logprobs_T]),
        versions_T=np.concatenate([begun.versions_T, rest.versions_T]),
        stop_reason=rest.stop_reason,
    )


def greedy_id(group_id: str) -> str:
    """Rollout id of a group's greedy member."""
    return f"{group_id}/{GREEDY}"


def rollout_seed(seed: int, rollout_id: str) -> int:
    """A sampler seed, 63 bits, the same in every process (unlike ``hash``)."""
    digest = blake2b(f"{seed}/{rollout_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def opening_tokens(tokenizer: Tokenizer, opening: Sequence[Message] | str) -> list[int]:
    """Tokens of a conversation's opening. With a chat template text becomes one user message; without one the text is
    tokenised as it is, and messages as their contents on lines of their own."""
    if tokenizer.chat_template is None:
        text = opening if isinstance(opening, str) else "\n".join(message["content"] for message in opening)
        return list(tokenizer(text)["input_ids"])
    messages = [{"role": "user", "content": opening}] if isinstance(opening, str) else list(opening)
    rendered = tokenizer.apply_chat_template(
        [dict(message) for message in messages], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return list(rendered)


def following_tokens(tokenizer: Tokenizer, messages: Sequence[Message], *, last_token: int) -> list[int]:
    """Tokens that the environment's messages add after a finished answer, up to where the model goes on.

    With a chat template: what it puts after an answer, whichever the answer is, less the end that the model wrote
    itself. The end is not always the tokenizer's end-of-sequence token, and a template may render an answer otherwise
    once a message follows it: so two conversations that differ in the answer alone are compared from their ends.

    Args:
        last_token: of the answer.
    """
    if tokenizer.chat_template is None:
        text = "\n".join(["", *(message["content"] for message in messages)])
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    one, other = (
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}, *map(dict, messages)],
            add_generation_prompt=True,
            tokenize=False,
        )
        for answer in ("a", "b")
    )
    after = commonprefix([one[::-1], other[::-1]])[::-1]
    token_ids = list(tokenizer(after, add_special_tokens=False)["input_ids"])
    return token_ids[token_ids.index(last_token) + 1 :] if last_token in token_ids else token_ids


@dataclass(slots=True)
class _Rows:
    """A rollout under way: everything so far, one entry per token."""

    rollout_id: str
    seed: int
    token_ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_turns: int = 0
    completion: str = ""
    stop_reason: StopReason = StopReason.EOS

    def request_seed(self, num_said: int) -> int:
        """Of the sampler in this turn, after so many tokens of it: from its middle on no random number comes again."""
        seed = rollout_seed(self.seed, f"after {num_said}") if num_said else self.seed
        return (seed + self.num_turns) % (1 << 63)

    def add_context(self, token_ids: list[int]) -> None:
        self.token_ids += token_ids
        self.loss_mask += [False] * len(token_ids)
        self.logprobs += [0.0] * len(token_ids)
        self.versions += [NOT_SAMPLED] * len(token_ids)

    def add_turn(self, turn: Turn) -> None:
        self.token_ids += turn.token_ids_T.tolist()
        self.loss_mask += [True] * len(turn.token_ids_T)
        self.logprobs += turn.behaviour_logprobs_T.tolist()
        self.versions += turn.versions_T.tolist()
        self.num_turns += 1
        self.stop_reason = turn.stop_reason

    def rollout(self, engine_name: str, seconds: float) -> Rollout:
        return Rollout(
            rollout_id=self.rollout_id,
            token_ids_T=np.asarray(self.token_ids, dtype=np.int32),
            loss_mask_T=np.asarray(self.loss_mask, dtype=np.bool_),
            behaviour_logprobs_T=np.asarray(self.logprobs, dtype=np.float32),
            versions_T=np.asarray(self.versions, dtype=np.int64),
            num_prompt_tokens=self.num_prompt_tokens,
            completion=self.completion,
            stop_reason=self.stop_reason,
            engine=engine_name,
            seconds=seconds,
        )
