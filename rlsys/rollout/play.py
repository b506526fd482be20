"""One rollout: a prompt played through an environment, on one engine from its first turn to its last.

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
class Member:
    """Which rollout of a group.

    Attributes:
        name: its index, or ``GREEDY``.
        retry: how often it was lost with its engine before.

    Example:
        >>> Member(name="2").rollout_id("sums:0:3#0")
        'sums:0:3#0/2'
    """

    name: str
    retry: int = 0

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

    async def play_rollout(self, prompt: Prompt, member: Member, spec: PlaySpec) -> Rollout | DroppedRollout:
        """A rollout whose request the engine refused, or that holds no sampled token, comes back as dropped.

        Raises:
            EngineLost: the engine is gone, and the rollout with it.
        """
        rollout_id = member.rollout_id(prompt.group_id)
        rows = _Rows(rollout_id=rollout_id, seed=member.seed(spec.seed, prompt.group_id))
        started = self._clock.now()
        try:
            await self._converse(prompt, rows, spec, 0.0 if member.name == GREEDY else spec.temperature)
        except RequestRefused as error:
            return DroppedRollout(rollout_id=rollout_id, cause=DropCause.ENGINE_REFUSED, detail=str(error))
        if not any(rows.loss_mask):
            return DroppedRollout(rollout_id=rollout_id, cause=DropCause.EMPTY)
        return rows.rollout(self._engine_name, self._clock.now() - started)

    async def _converse(self, prompt: Prompt, rows: _Rows, spec: PlaySpec, temperature: float) -> None:
        """Fill ``rows`` turn by turn until the environment, or a turn that was cut at its token limit, ends it."""
        env = self._make_env()
        rows.add_context(self._opening_tokens(prompt.group_id, env.reset(prompt)))
        rows.num_prompt_tokens = len(rows.token_ids)
        while True:
            turn = await self._engine.generate(
                GenerateRequest(
                    request_id=f"{rows.rollout_id}:{rows.num_turns}",
                    token_ids=list(rows.token_ids),
                    max_tokens=spec.max_tokens,
                    temperature=temperature,
                    seed=(rows.seed + rows.num_turns) % (1 << 63),
                )
            )
            rows.add_turn(turn)
            rows.completion = self._tokenizer.decode(turn.token_ids_T.tolist(), skip_special_tokens=True)
            messages = await env.step(rows.completion)
            if turn.stop_reason is StopReason.LENGTH:  # an answer without an end cannot be followed by another message
                return
            if messages is None:
                if rows.num_turns > 1:
                    rows.stop_reason = StopReason.ENV
                return
            rows.add_context(following_tokens(self._tokenizer, messages, last_token=rows.token_ids[-1]))

    def _opening_tokens(self, group_id: str, opening: Sequence[Message] | str) -> list[int]:
        """Rendered once for all members of a group that begin alike."""
        kept = self._openings.get(group_id)
        if kept is None or kept[0] != opening:
            kept = (opening, opening_tokens(self._tokenizer, opening))
            self._openings[group_id] = kept
            if len(self._openings) > OPENINGS_KEPT:
                del self._openings[next(iter(self._openings))]
        return kept[1]


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
