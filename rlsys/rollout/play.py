"""One group: the same prompt played ``group_size`` times through an environment, on one engine; and once more greedily,
where the reward of the greedy answer is to be the baseline.

Tokens in, tokens out: what was sampled is never tokenised again. A further turn's context is everything so far plus the
tokens of the environment's messages.

Legend of dimension suffixes: T tokens of one rollout.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
    RolloutGroup,
    StopReason,
    Turn,
)
from rlsys.rollout.clock import Clock
from rlsys.rollout.engine import Engine, GenerateRequest

Tokenizer = Any  # a tokenizer of transformers; its type would import torch

GREEDY = "greedy"  # in place of a member's index


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


async def play_group(
    prompt: Prompt,
    spec: PlaySpec,
    *,
    engine: Engine,
    engine_name: str,
    make_env: Callable[[], Env],
    tokenizer: Tokenizer,
    clock: Clock,
) -> RolloutGroup:
    """Play every member at once. A member whose request the engine refused, or that holds no sampled token, comes back
    in ``dropped``.

    Args:
        engine_name: written into the rollouts.
        make_env: a fresh environment for each member.
        tokenizer: renders the conversation (its chat template, where it has one) and decodes the answers.

    Raises:
        EngineLost: the engine is gone, and the whole group with it.
    """

    opening_of = _Openings(tokenizer)

    async def play(member: int | str, spec: PlaySpec) -> Rollout | DroppedRollout:
        rollout_id = f"{prompt.group_id}/{member}"
        rows = _Rows(rollout_id=rollout_id, seed=rollout_seed(spec.seed, rollout_id))
        started = clock.now()
        try:
            await _converse(prompt, rows, engine, make_env(), tokenizer, opening_of, spec)
        except RequestRefused as error:
            return DroppedRollout(rollout_id=rollout_id, cause=DropCause.ENGINE_REFUSED, detail=str(error))
        if not any(rows.loss_mask):
            return DroppedRollout(rollout_id=rollout_id, cause=DropCause.EMPTY)
        return rows.rollout(engine_name, clock.now() - started)

    tasks = [asyncio.create_task(play(member, spec)) for member in range(spec.group_size)]
    if spec.greedy_baseline:
        tasks.append(asyncio.create_task(play(GREEDY, replace(spec, temperature=0.0))))
    try:
        members = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # until their requests are off the engine
    return RolloutGroup(
        prompt=prompt,
        rollouts=tuple(member for member in members if isinstance(member, Rollout)),
        dropped=tuple(member for member in members if isinstance(member, DroppedRollout)),
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


class _Openings:
    """Renders an opening once for all members that begin alike."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._last: tuple[Sequence[Message] | str, list[int]] | None = None

    def tokens(self, opening: Sequence[Message] | str) -> list[int]:
        if self._last is None or self._last[0] != opening:
            self._last = (opening, opening_tokens(self._tokenizer, opening))
        return self._last[1]


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


async def _converse(
    prompt: Prompt,
    rows: _Rows,
    engine: Engine,
    env: Env,
    tokenizer: Tokenizer,
    opening_of: _Openings,
    spec: PlaySpec,
) -> None:
    """Fill ``rows`` turn by turn until the environment, or a turn that was cut at its token limit, ends it."""
    rows.add_context(opening_of.tokens(env.reset(prompt)))
    rows.num_prompt_tokens = len(rows.token_ids)
    while True:
        turn = await engine.generate(
            GenerateRequest(
                request_id=f"{rows.rollout_id}:{rows.num_turns}",
                token_ids=list(rows.token_ids),
                max_tokens=spec.max_tokens,
                temperature=spec.temperature,
                seed=(rows.seed + rows.num_turns) % (1 << 63),
            )
        )
        rows.add_turn(turn)
        rows.completion = tokenizer.decode(turn.token_ids_T.tolist(), skip_special_tokens=True)
        messages = await env.step(rows.completion)
        if turn.stop_reason is StopReason.LENGTH:  # an answer without an end cannot be followed by another message
            return
        if messages is None:
            if rows.num_turns > 1:
                rows.stop_reason = StopReason.ENV
            return
        rows.add_context(following_tokens(tokenizer, messages, last_token=rows.token_ids[-1]))
