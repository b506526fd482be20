"""The router: fresh enough, with room, where the prompt is cached, least loaded; else the rollout is parked."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlsys.rollout.router import EngineLoad, EngineReport, choose_engine


def load(name: str, step: int | None, running: int, slots: int = 16, report: EngineReport | None = None) -> EngineLoad:
    return EngineLoad(name=name, step=step, running_rollouts=running, slots=slots, report=report)


def says(waiting: int | None = 0, kv_share: float | None = 0.0, block: int = 128) -> EngineReport:
    return EngineReport(cache_block_tokens=block, num_waiting=waiting, kv_share=kv_share, num_preempted=0)


reports = st.none() | st.builds(
    EngineReport,
    cache_block_tokens=st.sampled_from([16, 128]),
    num_waiting=st.none() | st.integers(0, 20),
    kv_share=st.none() | st.floats(0, 1),
    num_preempted=st.none() | st.integers(0, 5),
)
loads_lists = st.lists(
    st.builds(
        EngineLoad,
        name=st.sampled_from("abcdef"),
        step=st.none() | st.integers(0, 4),
        running_rollouts=st.integers(0, 12),
        slots=st.integers(1, 8),
        report=reports,
    ),
    max_size=6,
    unique_by=lambda one: one.name,
)
asked = {
    "min_step": st.integers(0, 4),
    "prompt_tokens": st.floats(0, 300),
    "played_by": st.sets(st.sampled_from("abc")),
}


@given(loads_lists, st.fixed_dictionaries(asked))
def test_never_beyond_the_slots_never_an_older_version_and_nobody_waits_who_need_not(loads, request):
    fit = {one.name: one for one in loads if one.step is not None and one.step >= request["min_step"]}
    fit = {name: one for name, one in fit.items() if one.running_rollouts < one.slots}
    chosen = choose_engine(loads, **request)
    assert chosen in fit if fit else chosen is None


@given(loads_lists, st.fixed_dictionaries(asked), st.randoms())
def test_the_choice_depends_on_nothing_but_the_loads_whatever_their_order(loads, request, random):
    shuffled = list(loads)
    random.shuffle(shuffled)
    assert choose_engine(loads, **request) == choose_engine(shuffled, **request)


@given(loads_lists, st.fixed_dictionaries(asked))
def test_where_no_cache_decides_nobody_is_less_loaded_than_the_chosen_one(loads, request):
    request["played_by"] = set()
    by_name = {one.name: one for one in loads}
    chosen = choose_engine(loads, **request)
    if chosen is not None:
        others = (one for one in loads if one.serves(request["min_step"]) and one.free_slots)
        assert by_name[chosen].share == min(one.share for one in others)


@given(loads_lists, st.fixed_dictionaries(asked))
def test_an_engine_is_preferred_for_its_cache_only_where_the_prompt_fills_a_block_of_it(loads, request):
    by_name = {one.name: one for one in loads}
    chosen, without = choose_engine(loads, **request), choose_engine(loads, **{**request, "played_by": ()})
    if chosen != without:
        assert chosen in request["played_by"]
        assert request["prompt_tokens"] >= by_name[chosen].report.cache_block_tokens


def test_least_loaded_engine_wins_and_ties_go_by_name():
    assert choose_engine([load("a", 3, 8), load("b", 3, 4)], min_step=3) == "b"
    assert choose_engine([load("b", 3, 4), load("a", 3, 4)], min_step=3) == "a"
    assert choose_engine([load("a", 3, 4, slots=8), load("b", 3, 6, slots=24)], min_step=0) == "b"


def test_an_engine_behind_or_without_weights_gets_nothing():
    assert choose_engine([load("a", 2, 0), load("b", 3, 12)], min_step=3) == "b"
    assert choose_engine([load("a", 2, 0), load("b", None, 0)], min_step=3) is None


def test_a_rollout_is_parked_while_every_slot_is_taken():
    assert choose_engine([load("a", 3, 16), load("b", 3, 17)], min_step=0) is None
    assert choose_engine([load("a", 3, 15)], min_step=0) == "a"
    assert choose_engine([], min_step=0) is None


def test_a_fuller_cache_and_a_queue_inside_weigh_like_slots():
    assert choose_engine([load("a", 0, 4, report=says(kv_share=0.9)), load("b", 0, 8)], min_step=0) == "b"
    assert choose_engine([load("a", 0, 4, report=says(waiting=8)), load("b", 0, 8)], min_step=0) == "b"
    unknown = says(waiting=None, kv_share=None)
    assert choose_engine([load("a", 0, 4, report=unknown), load("b", 0, 8)], min_step=0) == "a"


def test_a_group_stays_where_its_prompt_is_cached_while_there_is_room():
    busy, idle = load("a", 0, 15, report=says()), load("b", 0, 0, report=says())
    full = load("a", 0, 16, report=says())
    assert choose_engine([busy, idle], min_step=0, prompt_tokens=128, played_by={"a"}) == "a"
    assert choose_engine([busy, idle], min_step=0, prompt_tokens=127, played_by={"a"}) == "b"
    assert choose_engine([full, idle], min_step=0, prompt_tokens=128, played_by={"a"}) == "b"
    small_blocks = load("a", 0, 15, report=says(block=16))
    assert choose_engine([small_blocks, idle], min_step=0, prompt_tokens=16, played_by={"a"}) == "a"
    both = [load("a", 0, 9, report=says()), load("b", 0, 8, report=says())]
    assert choose_engine(both, min_step=0, prompt_tokens=500, played_by={"a", "b"}) == "b"
