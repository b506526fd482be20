"""A teacher's answers become records, its failures drops or the end of the run; its folder is looked into."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rlsys.config.load import apply_overrides
from rlsys.config.schema import Config
from rlsys.errors import ConfigError, EngineLost, RequestRefused, TeacherFailed, TooManyDrops, WaitTimeout
from rlsys.plan.model_folder import ModelFacts
from rlsys.plan.teacher import check_same_tokenizer, check_teacher
from rlsys.records import DropCause, TeacherScores
from rlsys.rollout.teacher import (
    MAX_FAILURES_IN_A_ROW,
    OWNED_ARGUMENTS,
    TaughtScorer,
    TeacherSettings,
    num_asked,
    read_scores,
    teacher_environment,
)
from tests.builders import make_group

ROW = np.array([7, 3, 5], dtype=np.int32)


def test_each_place_has_its_own_token_first_and_then_its_candidates_likeliest_first():
    # place 1: token 3, which is the likeliest too; place 2: token 5, which is none of the two likeliest
    scores = read_scores(ROW, [3, 3, 9, 5, 8, 2], [-0.5, -0.5, -1.5, -4.0, -0.25, -2.0], top_k=2, student_vocab=10)
    assert scores.logprobs_T.tolist() == [0.0, -0.5, -4.0]
    assert scores.candidate_ids_TK.tolist() == [[0, 0], [3, 9], [8, 2]]
    assert scores.candidate_logprobs_TK.tolist() == [[0.0, 0.0], [-0.5, -1.5], [-0.25, -2.0]]
    assert scores.logprobs_T.dtype == scores.candidate_logprobs_TK.dtype == np.float32
    assert scores.candidate_ids_TK.dtype == np.int32


def test_without_candidates_only_what_stands_there_is_scored():
    scores = read_scores(ROW, [3, 5], [-0.5, -4.0], top_k=0, student_vocab=10)
    assert scores.logprobs_T.tolist() == [0.0, -0.5, -4.0]
    assert scores.candidate_ids_TK.shape == scores.candidate_logprobs_TK.shape == (3, 0)


@pytest.mark.parametrize("top_k", [0, 2])
def test_a_row_of_one_token_has_nothing_to_score(top_k):
    scores = read_scores(ROW[:1], [], [], top_k=top_k, student_vocab=10)
    assert scores.logprobs_T.tolist() == [0.0] and scores.candidate_ids_TK.shape == (1, top_k)


def test_candidates_that_do_not_exist_for_the_student_make_room_for_the_next_likeliest():
    # the student has tokens 0 to 9, the teacher two more: four candidates are asked for so that two are left
    assert num_asked(2, student_vocab=10, teacher_vocab=12) == 4
    flat_ids = [3, 11, 9, 10, 4, 5, 1, 2, 10, 11]
    flat_logprobs = [-3.0, -0.5, -1.0, -1.5, -2.0, -0.1, -0.2, -0.3, -0.4, -0.5]
    scores = read_scores(ROW, flat_ids, flat_logprobs, top_k=2, student_vocab=10)
    assert scores.candidate_ids_TK.tolist() == [[0, 0], [9, 4], [1, 2]]
    np.testing.assert_allclose(scores.candidate_logprobs_TK[1:], [[-1.0, -2.0], [-0.2, -0.3]], rtol=1e-6)


def test_no_more_is_asked_for_than_is_needed():
    assert num_asked(0, student_vocab=10, teacher_vocab=12) == 0
    assert num_asked(5, student_vocab=12, teacher_vocab=10) == 5
    assert num_asked(5, student_vocab=12, teacher_vocab=12) == 5


@given(st.data())
def test_what_the_engine_is_asked_for_always_holds_enough_candidates(data):
    """Whatever the order of likelihood, the result is that order cut to the student's tokens."""
    student, more = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 6))
    top_k = data.draw(st.integers(0, student))
    asked = num_asked(top_k, student_vocab=student, teacher_vocab=student + more)
    order = data.draw(st.permutations(range(student + more)))
    scores = read_scores(
        np.array([0, 0], dtype=np.int32),
        [0, *order[:asked]],
        [-9.0, *(-float(place) for place in range(asked))],
        top_k=top_k,
        student_vocab=student,
    )
    expected = [token for token in order if token < student][:top_k]
    assert scores.candidate_ids_TK[1].tolist() == expected
    assert scores.candidate_logprobs_TK[1].tolist() == [-float(order.index(token)) for token in expected]


@pytest.mark.parametrize(
    ("flat_ids", "top_k", "message"),
    [
        pytest.param([5], 0, "1 ids", id="a place is missing, as where a cache was read"),
        pytest.param([3, 3, 5, 8], 2, "4 ids", id="too few candidates"),
        pytest.param([3, 3, 9, 5, 8], 2, "5 ids", id="cut short"),
        pytest.param([3, 4], 0, "other tokens", id="another row"),
        pytest.param([3, 9, 10, 5, 8, 2], 2, "fewer than", id="candidates of no use to the student"),
    ],
)
def test_an_answer_that_does_not_fit_its_row_is_no_answer(flat_ids, top_k, message):
    with pytest.raises(ValueError, match=message):
        read_scores(ROW, flat_ids, [-1.0] * len(flat_ids), top_k=top_k, student_vocab=10)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("place", range(4))
def test_scores_that_are_not_finite_are_refused(bad, place):
    flat_logprobs = [-1.0] * 4
    flat_logprobs[place] = bad
    with pytest.raises(RequestRefused, match="not finite"):
        read_scores(ROW, [3, 3, 5, 8], flat_logprobs, top_k=1, student_vocab=10)


SETTINGS = TeacherSettings(
    model="m", dtype="float32", top_k=8, max_tokens=512, slots=4, start_timeout_s=1, timeout_s=1, vllm={"dtype": "half"}
)


def test_a_user_may_choose_the_teachers_precision_but_not_what_scoring_rests_on():
    arguments = replace(SETTINGS, vllm={"dtype": "half", "max_model_len": 9, "seed": 3}).arguments(on_cpu=True)
    assert arguments["dtype"] == "half" and arguments["seed"] == 3
    assert arguments["max_model_len"] == 513 and arguments["model"] == "m"
    assert replace(SETTINGS, vllm={}).arguments(on_cpu=True)["dtype"] == "float32"


def test_the_cache_of_a_teacher_on_cpu_is_bounded_and_the_bound_can_be_changed():
    assert SETTINGS.arguments(on_cpu=True)["kv_cache_memory_bytes"] == 512 * 2**20
    assert replace(SETTINGS, vllm={"kv_cache_memory_bytes": 5}).arguments(on_cpu=True)["kv_cache_memory_bytes"] == 5
    assert "kv_cache_memory_bytes" not in SETTINGS.arguments(on_cpu=False)
    assert "VLLM_CPU_KVCACHE_SPACE" not in teacher_environment(cpus=1, gpus=0)  # vLLM takes it before any argument


# --- scoring with rewards --------------------------------------------------------------------------------------------


class Rewards:
    """Gives the rewards 0, 1, 2, ... after ``seconds``; ``lost`` members are dropped, ``error`` is raised instead."""

    def __init__(self, seconds=0.0, lost=(), error=None):
        self.seconds, self.lost, self.error = seconds, lost, error
        self.was_cancelled = False

    async def score(self, group):
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        if self.error is not None:
            raise self.error
        scored = [replace(rollout, reward=float(place)) for place, rollout in enumerate(group.rollouts)]
        group = replace(group, rollouts=tuple(scored))
        lost = {group.rollouts[place].rollout_id: DropCause.REWARD_ERROR for place in self.lost}
        unscored = tuple(replace(r, reward=None) if r.rollout_id in lost else r for r in group.rollouts)
        return replace(group, rollouts=unscored).drop(lost)


def scores_of(rollout_id, token_ids_T):
    """Recognisable: every log-probability is minus the member's number minus one."""
    value = -1.0 - float(rollout_id.rpartition("/")[2])
    candidates = np.zeros((len(token_ids_T), 0))
    return TeacherScores(
        logprobs_T=np.full(len(token_ids_T), value, dtype=np.float32),
        candidate_ids_TK=candidates.astype(np.int32),
        candidate_logprobs_TK=candidates.astype(np.float32),
    )


class ScriptedTeacher:
    """Answers after ``seconds``. ``errors``: member number to what is raised instead."""

    def __init__(self, seconds=0.0, errors=None):
        self.seconds, self.errors = seconds, errors or {}
        self.running = self.most = self.asked = 0

    async def score(self, rollout_id, token_ids_T):
        self.asked += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.seconds)
            error = self.errors.get(int(rollout_id.rpartition("/")[2]))
            if error is not None:
                raise error
            return scores_of(rollout_id, token_ids_T)
        finally:
            self.running -= 1


def score(rewards, teacher, *groups, slots=64, timeout_s=60.0, grace_s=0.0):
    async def score_all():
        scorer = TaughtScorer(rewards, teacher, slots=slots, timeout_s=timeout_s, grace_s=grace_s)
        async with asyncio.timeout(30):
            return await asyncio.gather(*(scorer.score(group) for group in groups))

    return asyncio.run(score_all())


def unscored_group(num_members=3, index=0):
    return make_group(index, [[0, 0]] * num_members, [None] * num_members)


def test_every_rollout_gets_its_own_reward_and_its_own_scores():
    [group] = score(Rewards(), ScriptedTeacher(), unscored_group())
    assert [rollout.reward for rollout in group.rollouts] == [0.0, 1.0, 2.0]
    assert [set(rollout.teacher.logprobs_T.tolist()) for rollout in group.rollouts] == [{-1.0}, {-2.0}, {-3.0}]
    assert [len(rollout.teacher.logprobs_T) for rollout in group.rollouts] == [4, 4, 4]
    assert group.dropped == ()


def test_rewards_and_teacher_work_at_the_same_time():
    """Each waits for the other to have begun."""
    met = asyncio.Barrier(2)

    class Meeting(Rewards):
        async def score(self, group):
            await met.wait()
            return await super().score(group)

    class MeetingTeacher(ScriptedTeacher):
        async def score(self, rollout_id, token_ids_T):
            await met.wait()
            return await super().score(rollout_id, token_ids_T)

    [group] = score(Meeting(), MeetingTeacher(), unscored_group(1))
    assert group.rollouts[0].reward == 0.0 and group.rollouts[0].teacher is not None


@pytest.mark.parametrize("error", [RequestRefused("too long: 9 > 8"), WaitTimeout("the scores", 3)])
def test_a_rollout_that_the_teacher_fails_on_leaves_and_its_reward_with_it(error):
    [group] = score(Rewards(), ScriptedTeacher(errors={1: error}), unscored_group())
    assert [rollout.reward for rollout in group.rollouts] == [0.0, 2.0]
    [dropped] = group.dropped
    assert dropped.rollout_id.endswith("/1") and dropped.cause is DropCause.TEACHER_FAILED
    assert dropped.detail == str(error)
    assert sorted(group.baseline_rewards) == [0.0, 2.0]


def test_a_rollout_that_fails_both_ways_is_dropped_once():
    [group] = score(Rewards(lost=(1,)), ScriptedTeacher(errors={1: RequestRefused("no")}), unscored_group())
    assert [dropped.cause for dropped in group.dropped] == [DropCause.REWARD_ERROR]
    assert group.num_members == 3 and all(rollout.teacher is not None for rollout in group.rollouts)


@pytest.mark.parametrize("slots", [1, 3])
def test_no_more_rollouts_than_slots_are_on_the_teacher_over_all_groups(slots):
    teacher = ScriptedTeacher(seconds=0.001)
    groups = score(Rewards(), teacher, *(unscored_group(5, index) for index in range(4)), slots=slots)
    assert teacher.most == slots and teacher.asked == 20
    assert all(rollout.teacher is not None for group in groups for rollout in group.rollouts)


def test_waiting_for_a_slot_does_not_count_against_the_deadline():
    [group] = score(Rewards(), ScriptedTeacher(seconds=0.3), unscored_group(4), slots=1, timeout_s=0.9)
    assert len(group.rollouts) == 4


@pytest.mark.parametrize("error", [TeacherFailed("teacher-0 died"), EngineLost("engine teacher-0 is lost: killed")])
def test_a_dead_teacher_ends_the_run_by_name_and_nothing_goes_on_behind_it(error):
    rewards = Rewards(seconds=60)
    with pytest.raises(TeacherFailed, match="teacher-0"):
        score(rewards, ScriptedTeacher(errors={0: error}), unscored_group())
    assert rewards.was_cancelled


def test_a_teacher_that_gives_no_answer_at_all_ends_the_run_within_the_deadline():
    with pytest.raises(TeacherFailed, match="waited 0 s for the teacher to score test:0:0#0"):
        score(Rewards(), ScriptedTeacher(seconds=60), unscored_group(), timeout_s=0.1, grace_s=0.1)


def test_what_the_rewards_raise_is_raised_as_it_is_and_frees_the_teacher():
    teacher = ScriptedTeacher(seconds=60)
    with pytest.raises(TooManyDrops, match="of rewards"):
        score(Rewards(error=TooManyDrops("of rewards")), teacher, unscored_group())
    assert teacher.asked == 3 and teacher.running == 0


def refusing(members):
    return ScriptedTeacher(errors={member: RequestRefused(f"refused {member}") for member in members})


def test_a_teacher_that_fails_on_everything_ends_the_run_with_its_first_reason():
    with pytest.raises(TeacherFailed, match=f"none of {MAX_FAILURES_IN_A_ROW} rollouts in a row.*refused 0"):
        score(Rewards(), refusing(range(MAX_FAILURES_IN_A_ROW)), unscored_group(MAX_FAILURES_IN_A_ROW))


def test_one_answer_ends_a_row_of_failures():
    members = [member for member in range(2 * MAX_FAILURES_IN_A_ROW - 1) if member != MAX_FAILURES_IN_A_ROW - 1]
    [group] = score(Rewards(), refusing(members), unscored_group(2 * MAX_FAILURES_IN_A_ROW - 1))
    assert len(group.rollouts) == 1 and len(group.dropped) == 2 * MAX_FAILURES_IN_A_ROW - 2


# --- before the run --------------------------------------------------------------------------------------------------

WORDS = {"a": 0, "b": 1, "c": 2}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
}
STUDENT = ModelFacts(max_positions=None, vocab_size=290)


def write_tokenizer(folder, words=None, added=("<end>",)):
    tokenizer = Tokenizer(models.WordLevel(words or WORDS, unk_token="a"))
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="a")
    made.add_tokens([AddedToken(token, special=True) for token in added])
    made.save_pretrained(folder)


@pytest.fixture
def folders(tmp_path):
    for name in ("student", "teacher"):
        write_tokenizer(tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(LLAMA))
        (tmp_path / name / "model.safetensors").touch()
    return tmp_path / "student", tmp_path / "teacher"


def refused(check, *arguments):
    with pytest.raises(ConfigError) as caught:
        check(*arguments)
    assert all((caught.value.got, caught.value.wanted, caught.value.remedy))
    return caught.value


def test_one_tokenizer_in_two_folders_is_the_same(folders):
    check_same_tokenizer(*map(str, folders))


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"words": {"a": 0, "c": 1, "b": 2}}, "token 1 is 'c' to the teacher, 'b' to the student"),
        ({"words": WORDS | {"d": 3}}, "token 3 is 'd' to the teacher, '<end>' to the student"),
        ({"added": ()}, "token 3 is None to the teacher, '<end>' to the student"),
        ({"added": ("<stop>",)}, "token 3 is '<stop>' to the teacher, '<end>' to the student"),
        ({"added": ("<end>", "<think>")}, "token 4 is '<think>' to the teacher, None to the student"),
    ],
)
def test_another_tokenizer_is_refused_by_the_first_token_that_differs(folders, changes, got):
    student, teacher = folders
    write_tokenizer(teacher, **changes)
    error = refused(check_same_tokenizer, str(student), str(teacher))
    assert error.what == "teacher.path" and got in error.got


def test_which_token_ends_an_answer_may_differ(folders):
    student, teacher = folders
    path = teacher / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<end>"}))
    check_same_tokenizer(str(student), str(teacher))


def test_the_embedded_model_is_compared_without_its_folder(folders):
    assert "token 0 is 'a' to the teacher, '<pad>' to" in refused(check_same_tokenizer, "tiny", str(folders[1])).got


def test_a_tokenizer_that_does_not_load_is_named_by_its_key(folders):
    student, teacher = folders
    (teacher / "tokenizer.json").write_text("{")
    assert refused(check_same_tokenizer, str(student), str(teacher)).what == "teacher.path"
    assert refused(check_same_tokenizer, str(teacher), str(student)).what == "model.path"


def config_of(folders, *overrides):
    student, teacher = folders
    settings = [f"model.path={student}", f"teacher.path={teacher}", "rollout.max_tokens=28", *overrides]
    return apply_overrides(Config(), settings)


def test_a_teacher_that_fits_passes_and_none_is_no_matter(folders):
    check_teacher(config_of(folders, "teacher.top_k=128", "teacher.vllm.dtype=bfloat16"), STUDENT, 100)
    check_teacher(Config(), STUDENT, 10**6)


def test_a_teacher_may_be_quantised_since_it_is_never_trained(folders):
    config = LLAMA | {"quantization_config": {"quant_method": "fp8"}}
    (folders[1] / "config.json").write_text(json.dumps(config))
    check_teacher(config_of(folders), STUDENT, 100)


@pytest.mark.parametrize(
    ("override", "what", "told"),
    [
        ("teacher.path=/nowhere", "teacher.path", "no folder"),
        ("rollout.max_tokens=29", "rollout.max_tokens=29", "teacher's context"),
        ("teacher.vllm.max_model_len=64", "teacher.vllm.max_model_len", "rlsys does not set itself"),
        ("teacher.vllm.dtyp=half", "teacher.vllm.dtyp", "did you mean dtype?"),
    ],
)
def test_a_teacher_that_cannot_work_is_refused_by_its_key(folders, override, what, told):
    error = refused(check_teacher, config_of(folders, override), STUDENT, 100)
    assert error.what == what and told in str(error)


def test_more_candidates_than_tokens_are_refused(folders):
    config = config_of(folders, "teacher.top_k=65")
    error = refused(check_teacher, config, replace(STUDENT, vocab_size=64), 10)
    assert error.what == "teacher.top_k=65" and "teacher.top_k=64 or less" in error.remedy


def test_arguments_that_rlsys_sets_are_all_owned():
    with_defaults = replace(SETTINGS, vllm={}).arguments(on_cpu=True)
    changed = replace(SETTINGS, vllm=dict.fromkeys(with_defaults, "user")).arguments(on_cpu=True)
    owned = {name for name, value in changed.items() if value != "user"}
    assert owned == OWNED_ARGUMENTS.keys() - {"tokenizer"}  # vLLM takes it from the model's folder
