"""Playing a rollout: token-aligned rows, nothing sampled is tokenised again, each fails alone, a lost engine all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlsys.envs.single_turn import SingleTurn
from rlsys.errors import EngineLost
from rlsys.records import (
    NOT_SAMPLED,
    Draw,
    DropCause,
    DroppedRollout,
    Probe,
    Prompt,
    Rollout,
    RolloutGroup,
    StopReason,
    Version,
    WeightVersion,
)
from rlsys.rollout.engine import GenerateRequest
from rlsys.rollout.play import (
    Member,
    PartialRollout,
    Player,
    PlaySpec,
    following_tokens,
    greedy_id,
    opening_tokens,
    rollout_seed,
)
from rlsys.rollout.sim_engine import SimEngine
from rlsys.sim.clock import VirtualClock

WORDS = ["<end>", "<user>", "<model>", "<nl>", "one", "two", "three", "more", "again", "a"]
END, USER, MODEL, NEWLINE, ONE, TWO, THREE, MORE, AGAIN, _ = range(len(WORDS))
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<model> ' }}{{ m.content }}{{ ' <end> <nl> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<model>' }}{% endif %}"
)
PROMPT = Prompt(draw=Draw(source="t", index=0, epoch=0), content="one two")


def _tokenizer(chat_template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    made.chat_template = chat_template
    return made


class AskAgain:
    """Two turns: answers the first completion with one more message."""

    def __init__(self) -> None:
        self.completions: list[str] = []

    def reset(self, prompt: Prompt):
        return ({"role": "user", "content": prompt.content},)

    async def step(self, completion: str):
        self.completions.append(completion)
        return ({"role": "user", "content": "again"},) if len(self.completions) == 1 else None


def _play(answer, *, env=SingleTurn, tokenizer=None, max_tokens=8, greedy_baseline=False, **engine_options):
    async def play() -> RolloutGroup:
        probe = Probe(token_ids=(), logprobs=())
        version = Version(incarnation=1, step=4)
        await engine.load_weights(
            WeightVersion(version=version, segment="s", tensors=(), probe=probe, previous_probe=None)
        )
        player = Player(engine, "sim-0", make_env=env, tokenizer=tokenizer or _tokenizer(), clock=clock)
        spec = PlaySpec(group_size=2, temperature=1.0, max_tokens=max_tokens, seed=11, greedy_baseline=greedy_baseline)
        ended = await asyncio.gather(*(player.play_rollout(PROMPT, member, spec) for member in spec.members))
        return RolloutGroup(
            prompt=PROMPT,
            rollouts=tuple(one for one in ended if isinstance(one, Rollout)),
            dropped=tuple(one for one in ended if isinstance(one, DroppedRollout)),
        )

    clock = VirtualClock()
    engine = SimEngine("sim-0", clock, answer, tokens_per_s=10.0, **engine_options)
    return clock.run(play())


def test_a_single_turn_is_prompt_then_answer_token_for_token():
    group = _play(lambda request, version: [THREE, MORE, END])
    rollout = group.rollouts[0]
    code = Version(incarnation=1, step=4).code
    assert rollout.token_ids_T.tolist() == [USER, ONE, TWO, END, NEWLINE, MODEL, THREE, MORE, END]
    assert rollout.loss_mask_T.tolist() == [False] * 6 + [True] * 3
    assert rollout.versions_T.tolist() == [NOT_SAMPLED] * 6 + [code] * 3
    assert rollout.behaviour_logprobs_T.tolist() == [0.0] * 6 + [-1.0] * 3
    assert (rollout.num_prompt_tokens, rollout.completion) == (6, "three more")
    assert (rollout.stop_reason, rollout.engine) == (StopReason.EOS, "sim-0")
    assert rollout.seconds == pytest.approx(0.3)
    assert [member.rollout_id for member in group.rollouts] == ["t:0:0#0/0", "t:0:0#0/1"]


def test_a_second_turn_continues_the_sampled_tokens_as_the_template_would():
    answers = {6: [THREE, END], 14: [MORE, MORE, END]}  # by length of the context
    rollout = _play(lambda request, version: answers[len(request.token_ids)], env=AskAgain).rollouts[0]
    whole = _tokenizer().apply_chat_template(
        [
            {"role": "user", "content": "one two"},
            {"role": "assistant", "content": "three"},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": "more more"},
        ],
        return_dict=False,
    )
    assert rollout.token_ids_T.tolist() == whole[:-1]  # the template's newline after the last answer is not sampled
    assert rollout.loss_mask_T.tolist() == [False] * 6 + [True] * 2 + [False] * 6 + [True] * 3
    assert (rollout.completion, rollout.stop_reason) == ("more more", StopReason.ENV)
    assert (rollout.versions_T == NOT_SAMPLED).tolist() == (~rollout.loss_mask_T).tolist()


def test_an_answer_cut_at_its_limit_ends_the_conversation():
    rollout = _play(lambda request, version: [MORE] * 9, env=AskAgain, max_tokens=4).rollouts[0]
    assert rollout.token_ids_T[6:].tolist() == [MORE] * 4
    assert rollout.stop_reason is StopReason.LENGTH


def test_without_a_chat_template_text_stays_as_it_is():
    tokenizer = _tokenizer(chat_template=None)
    assert opening_tokens(tokenizer, "one two") == [ONE, TWO]
    assert following_tokens(tokenizer, [{"role": "user", "content": "again"}], last_token=END) == [AGAIN]


@pytest.mark.parametrize("last_token", [END, MODEL])
def test_the_end_that_the_model_wrote_is_not_written_twice_whichever_token_it_is(last_token):
    """Some templates end a turn with a token that is not the tokenizer's end of sequence."""
    template = TEMPLATE.replace("<end>", WORDS[last_token]).replace("'<model> ' }}", "'' }}")
    after = following_tokens(_tokenizer(template), [{"role": "user", "content": "again"}], last_token=last_token)
    assert after == [NEWLINE, USER, AGAIN, last_token, NEWLINE, MODEL]


def test_a_template_that_renders_the_last_answer_otherwise_does_not_garble_what_follows():
    """As templates of reasoning models do: a thought stands before an answer only while nothing follows it."""
    template = TEMPLATE.replace(
        "{{ m.content }}", "{{ 'three ' if loop.last and m.role != 'user' else '' }}{{ m.content }}"
    )
    again = [{"role": "user", "content": "again"}]
    assert following_tokens(_tokenizer(template), again, last_token=END) == [NEWLINE, USER, AGAIN, END, NEWLINE, MODEL]


@pytest.mark.parametrize(("chat_template", "opening"), [(None, [ONE, TWO]), ("<user> ", [USER, ONE, TWO])])
def test_a_first_token_that_tokenizer_and_template_both_put_stands_there_once(chat_template, opening):
    template = None if chat_template is None else "{{ bos_token }} <user> {{ messages[0].content }}"
    tokenizer = _tokenizer(template)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<model> $A", special_tokens=[("<model>", MODEL)]
    )
    tokenizer.bos_token = "<model>"
    assert opening_tokens(tokenizer, "one two") == [MODEL, *opening]


def test_a_greedy_member_is_played_beside_the_others():
    asked = {}

    def answer(request, version):
        asked[request.request_id] = request.temperature
        return [THREE, END] if request.temperature else [MORE, END]

    group = _play(answer, greedy_baseline=True)
    assert asked == {"t:0:0#0/0:0": 1.0, "t:0:0#0/1:0": 1.0, "t:0:0#0/greedy:0": 0.0}
    assert [member.completion for member in group.rollouts] == ["three", "three", "more"]
    assert group.rollouts[2].rollout_id == greedy_id(group.group_id)
    spec = PlaySpec(group_size=2, temperature=1.0, max_tokens=8, seed=0)
    assert (spec.num_members, replace(spec, greedy_baseline=True).num_members) == (2, 3)


def test_refused_and_empty_members_are_dropped_by_cause():
    group = _play(lambda request, version: [THREE], max_model_len=6)
    assert [member.cause for member in group.dropped] == [DropCause.ENGINE_REFUSED] * 2
    assert "context of 6" in group.dropped[0].detail
    right_seed = rollout_seed(11, "t:0:0#0/1")
    group = _play(lambda request, version: [THREE, END] if request.seed == right_seed else [])
    assert [member.rollout_id for member in group.rollouts] == ["t:0:0#0/1"]
    assert [(member.rollout_id, member.cause) for member in group.dropped] == [("t:0:0#0/0", DropCause.EMPTY)]


def test_a_context_too_long_for_another_turn_drops_the_member_by_cause():
    answers = {6: [THREE, END], 14: [MORE, END]}  # by length of the context
    group = _play(lambda request, version: answers[len(request.token_ids)], env=AskAgain, max_model_len=15)
    assert len(group.rollouts) == 2
    group = _play(lambda request, version: answers[len(request.token_ids)], env=AskAgain, max_model_len=14)
    assert group.rollouts == ()
    assert [member.cause for member in group.dropped] == [DropCause.ENGINE_REFUSED] * 2
    assert "prompt of 14 tokens, context of 14" in group.dropped[0].detail


def test_a_lost_engine_loses_every_rollout_on_it():
    async def play() -> None:
        await engine.load_weights(weights)
        player = Player(engine, "sim-0", make_env=SingleTurn, tokenizer=_tokenizer(), clock=clock)
        spec = PlaySpec(group_size=3, temperature=1.0, max_tokens=8, seed=0)
        playing = [asyncio.create_task(player.play_rollout(PROMPT, member, spec)) for member in spec.members]
        await clock.sleep(0.5)
        engine.crash()
        for rollout in playing:
            with pytest.raises(EngineLost, match="it crashed"):
                await rollout
        assert clock.now() == pytest.approx(0.04 + 0.5)

    clock = VirtualClock()
    engine = SimEngine("sim-0", clock, lambda request, version: [THREE] * 8, tokens_per_s=10.0)
    probe = Probe(token_ids=(), logprobs=())
    weights = WeightVersion(
        version=Version(incarnation=0, step=1), segment="s", tensors=(), probe=probe, previous_probe=None
    )
    clock.run(play())


def _weights(step: int) -> WeightVersion:
    return WeightVersion(
        version=Version(incarnation=0, step=step),
        segment="s",
        tensors=(),
        probe=Probe(token_ids=(), logprobs=()),
        previous_probe=None,
    )


def _counting_on(requests: list[GenerateRequest]) -> Callable[[GenerateRequest, Version], list[int]]:
    """Answers 1, 2, 3, ..., 19 from where the context has got to; in a second turn thirty tokens."""

    def answer(request: GenerateRequest, version: Version) -> list[int]:
        requests.append(request)
        return list(range(len(request.token_ids) - 5, 20)) or [MORE] * 30

    return answer


def _play_on(moments: list[float], env: type = SingleTurn, max_tokens: int = 9) -> tuple[Any, list[GenerateRequest]]:
    """One rollout, played on one engine after the other, each interrupted so many seconds after the rollout came; the
    last one is not. Ten tokens a second; engine k serves version k."""

    async def play() -> Any:
        member = Member(name="0")
        for number, moment_s in enumerate([*moments, None]):
            engine = SimEngine(f"sim-{number}", clock, _counting_on(requests), tokens_per_s=10.0)
            await engine.load_weights(_weights(number))
            player = Player(engine, f"sim-{number}", make_env=env, tokenizer=_tokenizer(), clock=clock)
            playing = asyncio.create_task(player.play_rollout(PROMPT, member, spec))
            if moment_s is not None:
                await clock.sleep(moment_s)
                await engine.interrupt()
            ended = await playing
            if not isinstance(ended, PartialRollout) or ended.turn is None:
                return ended
            member = replace(member, begun=ended)
        return ended

    spec = PlaySpec(group_size=1, temperature=1.0, max_tokens=max_tokens, seed=11)
    requests: list[GenerateRequest] = []
    clock = VirtualClock()
    return clock.run(play()), requests


def test_what_an_engine_lets_go_another_one_ends_and_both_parts_stand():
    rollout, (first, second) = _play_on([0.35])
    assert rollout.token_ids_T.tolist() == [USER, ONE, TWO, END, NEWLINE, MODEL, *range(1, 10)]
    assert rollout.versions_T.tolist() == [NOT_SAMPLED] * 6 + [0] * 3 + [1] * 6
    assert rollout.behaviour_logprobs_T.tolist() == [0.0] * 6 + [-1.0] * 9
    assert (rollout.stop_reason, rollout.engine, rollout.num_prompt_tokens) == (StopReason.LENGTH, "sim-1", 6)
    assert rollout.seconds == pytest.approx(0.35 + 0.6)
    assert second.token_ids == [*first.token_ids, 1, 2, 3] and second.max_tokens == 9 - 3
    assert second.seed != first.seed == rollout_seed(11, "t:0:0#0/0")


@given(st.lists(st.floats(0.0, 0.5), max_size=4), st.integers(1, 12))
def test_however_often_it_is_moved_no_token_is_lost_or_doubled_and_no_random_number_comes_again(moments, max_tokens):
    rollout, requests = _play_on(moments, max_tokens=max_tokens)
    assert rollout.token_ids_T[6:].tolist() == list(range(1, max_tokens + 1))
    assert rollout.num_sampled_tokens == max_tokens
    # the same seed only where the same token is the next one
    assert len({request.seed for request in requests}) == len({len(request.token_ids) for request in requests})
    assert {len(request.token_ids) + request.max_tokens for request in requests} == {6 + max_tokens}


def test_once_its_environment_has_taken_a_step_it_cannot_go_on_elsewhere():
    partial, requests = _play_on([2.5], env=AskAgain, max_tokens=50)
    assert partial == PartialRollout(rollout_id="t:0:0#0/0", turn=None, seconds=2.5) and len(requests) == 2


def test_an_opening_is_rendered_once_for_a_group_and_anew_for_a_member_that_begins_otherwise():
    rendered = []

    class Numbered(AskAgain):
        numbers = iter([1, 1, 1, 2])

        def reset(self, prompt: Prompt):
            return "one " * next(self.numbers)

    tokenizer = _tokenizer()
    apply = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda messages, **options: (
        (rendered.append(messages[0]["content"]) if options["tokenize"] else None) or apply(messages, **options)
    )
    group = _play(lambda request, version: [MORE] * 8, env=Numbered, tokenizer=tokenizer, max_tokens=1)
    assert [rollout.num_prompt_tokens for rollout in group.rollouts] == [5, 5]
    assert rendered == ["one "]
    _play(lambda request, version: [MORE] * 8, env=Numbered, tokenizer=tokenizer, max_tokens=1)
    assert rendered == ["one ", "one ", "one one "]


def test_a_retry_keeps_its_name_and_has_a_seed_of_its_own():
    seeds = {Member(name="1", retry=retry).seed(11, "t:0:0#0") for retry in range(4)}
    assert len(seeds) == 4 and rollout_seed(11, "t:0:0#0/1") in seeds  # the first try's is that of the rollout id
    assert Member(name="1", retry=3).rollout_id("t:0:0#0") == "t:0:0#0/1"


def test_seeds_are_the_same_in_every_process_and_differ_by_member():
    assert rollout_seed(11, "t:0:0#0/1") == 3241438616641685366
    assert rollout_seed(11, "t:0:0#0/2") != rollout_seed(11, "t:0:0#0/1") != rollout_seed(12, "t:0:0#0/1")
    assert 0 <= rollout_seed(11, "t:0:0#0/1") < 1 << 63
