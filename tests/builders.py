"""Tiny records for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rlsys.records import NOT_SAMPLED, Draw, Prompt, Rollout, RolloutGroup, StopReason, Version
from rlsys.reward.result import Completion


def make_prompt(index: int = 0, attempt: int = 0) -> Prompt:
    draw = Draw(source="test", index=index, epoch=0)
    return Prompt(draw=draw, content=f"question {index}", answer=str(index), attempt=attempt)


def make_rollout(
    rollout_id: str, steps: Sequence[int], *, num_prompt_tokens: int = 2, reward: float | None = 1.0
) -> Rollout:
    """A rollout whose sampled tokens were sampled by the versions of ``steps``, one each."""
    length = num_prompt_tokens + len(steps)
    codes = [NOT_SAMPLED] * num_prompt_tokens + [Version(incarnation=0, step=step).code for step in steps]
    sampled_T = np.arange(length) >= num_prompt_tokens
    return Rollout(
        rollout_id=rollout_id,
        token_ids_T=np.arange(length, dtype=np.int32),
        loss_mask_T=sampled_T,
        behaviour_logprobs_T=np.where(sampled_T, -1.0, 0.0).astype(np.float32),
        versions_T=np.array(codes, dtype=np.int64),
        num_prompt_tokens=num_prompt_tokens,
        completion="answer",
        stop_reason=StopReason.EOS,
        engine="test",
        seconds=1.0,
        reward=reward,
    )


def make_group(
    index: int, steps_by_rollout: Sequence[Sequence[int]], rewards: Sequence[float] | None = None
) -> RolloutGroup:
    prompt = make_prompt(index)
    if rewards is None:
        rewards = [float(member % 2) for member in range(len(steps_by_rollout))]
    return RolloutGroup(
        prompt=prompt,
        rollouts=tuple(
            make_rollout(f"{prompt.group_id}/{member}", steps, reward=reward)
            for member, (steps, reward) in enumerate(zip(steps_by_rollout, rewards, strict=True))
        ),
    )


def make_completion(text: str, *turns: Sequence[int]) -> Completion:
    """What a reward function is asked about. ``turns``: the sampled tokens of each; none is one turn of one token."""
    turns = turns or ((0,),)
    return Completion(
        text=text,
        token_ids=tuple(token_id for turn in turns for token_id in turn),
        turn_lengths=tuple(map(len, turns)),
    )


def make_unscored_group(*completions: str, index: int = 0) -> RolloutGroup:
    """A group as it comes from an engine: one member per completion, none scored."""
    prompt = replace(make_prompt(index), content="1+2=", answer="3")
    rollouts = (
        replace(make_rollout(f"{prompt.group_id}/{member}", [0], reward=None), completion=completion)
        for member, completion in enumerate(completions)
    )
    return RolloutGroup(prompt=prompt, rollouts=tuple(rollouts))
