"""A rollout that its engine lets go ends on another one, both real: no token is lost, doubled or changed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from rlsys.envs.single_turn import SingleTurn
from rlsys.records import NOT_SAMPLED, Draw, Prompt, StopReason
from rlsys.rollout.engine import GenerateRequest
from rlsys.rollout.play import Member, PartialRollout, Player, PlaySpec
from tests.engine_contract import check_interruption
from tests.integration.serving import END, Bench, WallClock, logprobs_of, model_of, running, serving_folder

pytestmark = pytest.mark.engines

NUM_TOKENS, NUM_ROLLOUTS = 500, 12
SPEC = PlaySpec(group_size=NUM_ROLLOUTS, temperature=1.0, max_tokens=NUM_TOKENS, seed=3)
PROMPT = Prompt(draw=Draw(source="moved", index=0, epoch=0), content="w17")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with serving_folder(tmp_path_factory.mktemp("moved")) as folder:
        yield folder


def player_on(bench: Bench) -> Player:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bench.folder / "model")
    return Player(bench.engine, bench.engine._name, make_env=SingleTurn, tokenizer=tokenizer, clock=WallClock())


async def begin(bench: Bench) -> dict[str, PartialRollout]:
    """Under version 1, until the engine lets all of it go: what there is by then, by the members' names."""
    await bench.engine.load_weights(bench.weights(1))
    player = player_on(bench)
    playing = [asyncio.create_task(player.play_rollout(PROMPT, member, SPEC)) for member in SPEC.members]
    request = GenerateRequest(request_id="r", token_ids=[17], max_tokens=60, temperature=1.0, seed=3)
    await check_interruption(bench.engine, request, WallClock())
    begun = dict(zip([member.name for member in SPEC.members], await asyncio.gather(*playing), strict=True))
    # one or the other may have ended by itself, with the least likely token
    return {name: partial for name, partial in begun.items() if isinstance(partial, PartialRollout)}


async def go_on(bench: Bench, begun: dict[str, PartialRollout]) -> list[Any]:
    """Under version 2, to the end."""
    await bench.engine.load_weights(bench.weights(2))
    player = player_on(bench)
    members = (Member(name=name, begun=partial) for name, partial in begun.items())
    return [*await asyncio.gather(*(player.play_rollout(PROMPT, member, SPEC) for member in members))]


def test_each_token_of_a_moved_rollout_is_that_of_the_engine_and_version_it_is_stamped_with(folder):
    with running("rollout-0", folder, timeout_s=120) as first:
        begun = first.run(begin(first))
    with running("rollout-1", folder, timeout_s=120) as second:
        ended = second.run(go_on(second, begun))
    assert len(ended) > NUM_ROLLOUTS / 2
    for partial, rollout in zip(begun.values(), ended, strict=True):
        turn, answer_ids = partial.turn, rollout.token_ids_T[rollout.num_prompt_tokens :].tolist()
        num_begun = len(turn.token_ids_T)
        assert turn.stop_reason is StopReason.INTERRUPTED and 0 < num_begun < NUM_TOKENS
        assert len(answer_ids) == NUM_TOKENS or answer_ids[-1] == END
        assert answer_ids[:num_begun] == turn.token_ids_T.tolist() and END not in answer_ids[:-1]
        versions = [NOT_SAMPLED] * rollout.num_prompt_tokens + [1] * num_begun + [2] * (len(answer_ids) - num_begun)
        assert rollout.versions_T.tolist() == versions and rollout.engine == "rollout-1"
        assert rollout.seconds > partial.seconds > 0
        for step in (1, 2):
            reference_T = logprobs_of(model_of(step), rollout.token_ids_T.tolist())
            assert np.abs(rollout.behaviour_logprobs_T - reference_T)[rollout.versions_T == step].max() < 1e-3
