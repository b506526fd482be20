"""What is refused across sections, and what a config may point at."""

import json
from functools import partial

import pytest

from rlsys.config import checks
from rlsys.config.load import apply_overrides, dump_config
from rlsys.config.presets import PRESETS, resolve
from rlsys.config.schema import Config, Row
from rlsys.errors import ConfigError
from rlsys.plan import algorithm, facts, references
from rlsys.plan.engine_arguments import check_engine_arguments, check_engine_workers
from rlsys.plan.preflight import preflight
from rlsys.plan.training import check_training
from rlsys.prompts.question import Question
from rlsys.prompts.source import LoadedData, PromptSource
from rlsys.prompts.split import Split
from rlsys.rollout.vllm_settings import OWNED_ARGUMENTS
from rlsys.train.lora import check_lora


def config_of(*overrides: str) -> Config:
    return resolve(apply_overrides(Config(), ["data.task={name: reversed_sum}", *overrides]))


def refused(check, config: Config) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check(config)
    error = caught.value
    assert all((error.what, error.got, error.wanted, error.remedy)), str(error)
    return error


# --- across sections


def test_staleness_without_a_correction_is_refused():
    check = checks.check_staleness_is_corrected
    error = refused(check, config_of("rollout.max_staleness=2", "algo.correction={name: none}"))
    assert error.what == "algo.correction" and "rollout.max_staleness=2" in error.got


@pytest.mark.parametrize(
    "escape", ["rollout.max_staleness=0", "algo.allow_uncorrected=true", "algo.correction.name=tis"]
)
def test_each_remedy_for_uncorrected_staleness_is_one(escape):
    checks.check_staleness_is_corrected(config_of("rollout.max_staleness=2", "algo.correction={name: none}", escape))


def test_a_batch_holds_a_rollout_for_every_step_and_rank():
    sizes = ("train.prompts_per_batch=2", "rollout.group_size=2", "train.ranks=2")
    checks.check_batch_can_be_divided(config_of(*sizes, "train.steps_per_batch=2"))
    error = refused(checks.check_batch_can_be_divided, config_of(*sizes, "train.steps_per_batch=3"))
    assert error.what == "train.steps_per_batch=3" and "4 rollouts" in error.got and "6" in error.wanted


@pytest.mark.parametrize("pass_at", ["[1, 5]", "[0]"])
def test_pass_at_k_needs_k_samples(pass_at):
    checks.check_pass_at(config_of("eval.samples=0", f"eval.pass_at={pass_at}"))
    assert refused(checks.check_pass_at, config_of("eval.samples=4", f"eval.pass_at={pass_at}")).what == "eval.pass_at"


def test_data_is_named_exactly_once():
    neither = resolve(Config())
    assert refused(checks.check_data_is_named_once, neither).got == "neither"
    assert refused(checks.check_data_is_named_once, config_of("data.train_path=a.jsonl")).got == "both"
    assert refused(checks.check_data_is_named_once, config_of("data.eval_path=b.jsonl")).what == "data.eval_path"


# --- the run folder


def check_new(config):
    checks.check_run_folder(config, resume=False)


@pytest.fixture
def run(tmp_path):
    """A config, and the folder of a run of it that trained a batch."""
    config = config_of(f"run.root={tmp_path}", "run.name=a")
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "metrics.jsonl").write_text("{}\n")
    return config, folder


def test_a_run_that_trained_nothing_may_be_started_again(run):
    config, folder = run
    (folder / "metrics.jsonl").write_text("")
    (folder / "log.txt").touch()
    check_new(config)
    check_new(apply_overrides(config, ["rollout.max_staleness=3"]))


@pytest.mark.parametrize(
    "change",
    [
        "run.steps=999",
        "eval.every_steps=3",
        "rollout.replicas=2",
        "rollout.timeout_s=7",
        "checkpoint.keep=5",
        "train.ranks=2",
        "train.tensor_parallel=2",
        "train.zero_stage=3",
    ],
)
def test_a_resumed_run_may_change_how_far_it_goes_and_what_it_runs_on(run, change):
    config, _ = run
    checks.check_run_folder(config, resume=True)
    checks.check_run_folder(apply_overrides(config, [change]), resume=True)


@pytest.mark.parametrize(
    "change", ["run.seed=5", "rollout.max_staleness=3", "train.lr=1.0", "train.lora={r: 4}", "data.eval_questions=7"]
)
def test_a_resumed_run_may_not_change_what_it_learns_from_and_how(run, change):
    config, _ = run
    error = refused(lambda other: checks.check_run_folder(other, resume=True), apply_overrides(config, [change]))
    assert change.partition("=")[0] in error.got and "run.steps" in error.wanted


def test_a_started_or_finished_run_is_not_overwritten(run):
    config, folder = run
    assert "a started run of this config" in refused(check_new, config).got
    (folder / "result.json").write_text("{}")
    error = refused(check_new, config)
    assert "a finished run of this config" in error.got
    assert f"rm -r {folder}" in error.remedy and "--resume" in error.remedy


def test_a_run_with_another_config_is_not_overwritten_and_the_difference_is_named(run):
    config, _ = run
    other = apply_overrides(config, ["rollout.max_staleness=3"])
    assert "rollout.max_staleness: 1 there, 3 here" in refused(check_new, other).got


def test_a_folder_of_other_things_is_left_alone(run):
    config, folder = run
    (folder / "metrics.jsonl").rename(folder / "letter.txt")
    assert "other things than a run: letter.txt" in refused(check_new, config).got


@pytest.mark.parametrize("text", ["run: [", "- a list", None])
def test_a_config_that_cannot_be_read_counts_as_another_one(run, text):
    config, folder = run
    (folder / "config.yaml").unlink() if text is None else (folder / "config.yaml").write_text(text)
    assert "cannot be read" in refused(check_new, config).got


def test_a_file_in_place_of_the_run_folder_is_refused(tmp_path):
    (tmp_path / "a").touch()
    assert "is a file" in refused(check_new, config_of(f"run.root={tmp_path}", "run.name=a")).got


# --- the algorithm's tables


@pytest.mark.parametrize(
    ("rows", "what", "got"),
    [
        (["algo.loss={name: gspo}"], "algo.aggregation", "token_mean with the loss gspo"),
        (["algo.loss={name: topr}"], "algo.anchor", "proximal with the loss topr"),
        (["algo.rejections=[{name: veto}, {name: tis}]"], "algo.rejections.1.name", "rejects none"),
        (["algo.aggregation={name: constant}"], "algo.aggregation.tokens", "nothing"),
        (["algo.rejections=[{name: reject_k2, hihg: 3}]"], "algo.rejections.0.hihg", "no such parameter"),
        (["algo.shaping=[{name: cosine}]"], "algo.shaping.0.name", "'cosine'"),
        (["algo.kl={name: k3}", "algo.kl_in=reward"], "algo.kl_in", "advantage grpo"),
        (["algo.kl={name: k1}"], "algo.kl", "expected gradient is 0"),
        (["algo.kl={name: k3}", "algo.kl_coef=0"], "algo.kl_coef", "for nothing"),
        (["algo.kl_coef=0.1"], "algo.kl_coef", "acts on nothing"),
        (["algo.reference_every_steps=5"], "algo.reference_every_steps", "acts on nothing"),
        (["algo.kl={name: k3}", "algo.kl_control={name: adaptive_entropy}"], "algo.kl_control.name", "other term"),
        (["algo.entropy_control={name: linear_decay}"], "algo.entropy_control", "acts on nothing"),
        (["critic.lr=0.1"], "critic.lr", "needs no critic"),
        (["algo.preset=ppo", "critic.loss={name: absolute}"], "critic.loss.name", "'absolute'"),
        (["teacher.top_k=4"], "teacher.top_k", "no teacher"),
        (["teacher.path=tiny", "rollout.temperature=0.7"], "rollout.temperature=0.7", "temperature 1"),
        (["rollout.group_size=1"], "rollout.group_size=1", "grpo, which compares"),
        (["algo.selection=[{name: roc, keep: 8}]", "rollout.group_size=8"], "algo.selection.0.keep", "8 of groups"),
    ],
)
def test_rows_that_do_nothing_or_do_not_fit_together_are_refused(rows, what, got):
    error = refused(algorithm.check_rows, resolve(config_of(*rows)))
    assert error.what == what and got in error.got and error.remedy


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_passes_the_checks_and_is_told_in_words(name):
    config = resolve(config_of(f"algo.preset={name}", "rollout.max_staleness=2", "train.steps_per_batch=2"))
    checks.check_staleness_is_corrected(config)
    text = "\n".join(facts.of_references(config, found_of(config)))
    assert f"at the {config.algo.anchor} anchor" in text and "trained without a correction" not in text


def test_what_does_nothing_is_told():
    def told(*words):
        config = resolve(config_of(*words))
        return [line for line in facts.of_references(config, found_of(config)) if line.startswith("inactive")]

    assert told("rollout.max_staleness=1") == []
    (line,) = told("rollout.max_staleness=0")
    assert "tis(cap=2.0), but for rounding" in line
    (line,) = told("train.steps_per_batch=1")
    assert "trust region never acts" in line and "REINFORCE x the correction" in line
    (line,) = told("teacher.path=tiny", "rollout.max_staleness=1")
    assert "the rewards and grpo" in line


def test_dr_grpo_divides_by_the_longest_answer_allowed():
    config = resolve(config_of("algo.preset=dr_grpo", "rollout.max_tokens=77"))
    assert config.algo.aggregation == Row(name="seq_mean_token_sum_norm", max_tokens=77)


def test_the_behaviour_anchor_stands_for_a_correction_of_stale_tokens():
    config = config_of("algo.correction={name: none}", "rollout.max_staleness=1")
    assert "algo.anchor=behaviour" in refused(checks.check_staleness_is_corrected, resolve(config)).remedy
    checks.check_staleness_is_corrected(resolve(apply_overrides(config, ["algo.anchor=behaviour"])))


@pytest.mark.parametrize("loss", ["dapo_clip", "cispo", "dppo_tv", "dual_clip"])
@pytest.mark.parametrize("correction", ["aipo", "icepop", "mis", "importance"])
def test_rows_of_tokens_and_sequences_can_be_combined(loss, correction):
    config = resolve(config_of(f"algo.loss={{name: {loss}}}", f"algo.correction={{name: {correction}}}"))
    assert algorithm.check_rows(config)["loss"].startswith(loss)


def test_rows_are_written_out_with_their_defaults():
    assert algorithm.check_rows(config_of("algo.correction={name: tis, cap: 3}")) == {
        "advantage": "grpo(scale_by_std=True, eps=1e-06, unbiased=True)",
        "loss": "ppo_clip(eps_low=0.2, eps_high=0.2)",
        "correction": "tis(cap=3)",
        "aggregation": "token_mean()",
    }


@pytest.mark.parametrize(
    ("override", "what", "remedy"),
    [
        ("algo.loss={name: ppo_clop}", "algo.loss.name", "did you mean ppo_clip?"),
        ("algo.loss={name: ppo_clip, eps_hihg: 0.3}", "algo.loss.eps_hihg", "did you mean eps_high?"),
        ("algo.correction={name: none, cap: 2}", "algo.correction.cap", "remove it"),
        ("algo.correction={name: tis, cap: two}", "algo.correction.cap", "default is 2.0"),
        ("algo.correction={name: tis, cap: true}", "algo.correction.cap", "default is 2.0"),
        ("algo.advantage={name: grpo, scale_by_std: 1}", "algo.advantage.scale_by_std", "default is True"),
        ("algo.correction={name: tis, cap: -1}", "algo.correction", "docstring of tis"),
    ],
)
def test_a_row_that_is_no_call_of_its_function_is_refused(override, what, remedy):
    error = refused(algorithm.check_rows, config_of(override))
    assert error.what == what and remedy in error.remedy


@pytest.mark.parametrize(
    ("lora", "what", "got"),
    [
        ({"lora_dropout": 0.1}, "train.lora.lora_dropout", "0.1"),
        ({"modules_to_save": ["lm_head"]}, "train.lora.modules_to_save", "lm_head"),
        ({"rnak": 8}, "train.lora", "rnak"),
    ],
)
def test_adapters_that_peft_does_not_know_or_that_train_more_are_refused(lora, what, got):
    error = refused(check_lora, lora)
    assert error.what == what and got in error.got and error.remedy


def test_the_base_below_adapters_is_a_reference_that_never_moves():
    words = ("algo.kl={name: k3}", "algo.reference_every_steps=5", "train.lora={r: 4}")
    assert refused(algorithm.check_rows, resolve(config_of(*words))).what == "algo.reference_every_steps"


def test_a_parameter_without_default_has_to_be_given():
    def row(rewards_S, *, power: float):
        return rewards_S

    config = config_of("algo.advantage={name: mine}")
    check = partial(algorithm.check_row, "algo.advantage", table={"mine": row})
    assert refused(check, config.algo.advantage).what == "algo.advantage.power"


# --- options passed through


@pytest.mark.parametrize(
    ("option", "remedy"),
    [("model=m", "model.path"), ("logprobs_mode=raw_logprobs", "cannot be changed"), ("blok_size=16", "block_size")],
)
def test_vllm_options_that_rlsys_sets_or_vllm_does_not_know_are_refused(option, remedy):
    check = partial(check_engine_arguments, "rollout.vllm", owned=OWNED_ARGUMENTS)
    check({"block_size": 16})
    error = refused(check, config_of(f"rollout.vllm.{option}").rollout.vllm)
    assert error.what == f"rollout.vllm.{option.partition('=')[0]}" and remedy in error.remedy


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["rollout.vllm.tensor_parallel_size=2"], "rollout.cpus_per_replica"),
        (["rollout.vllm.tensor_parallel_size=2", "rollout.gpus_per_replica=1"], "rollout.gpus_per_replica"),
        (["rollout.vllm.tensor_parallel_size=2", "rollout.gpus_per_replica=3"], "rollout.gpus_per_replica"),
        (["rollout.vllm.tensor_parallel_size=0"], "rollout.vllm.tensor_parallel_size"),
        (["rollout.vllm.pipeline_parallel_size=two"], "rollout.vllm.pipeline_parallel_size"),
    ],
)
def test_an_engine_whose_processes_ray_reserves_nothing_for_is_refused(overrides, what):
    assert refused(check_engine_workers, config_of(*overrides).rollout).what == what


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["rollout.cpus_per_replica=0.5"],
        ["rollout.gpus_per_replica=0.5"],
        ["rollout.vllm.tensor_parallel_size=2", "rollout.cpus_per_replica=0.8"],
        ["rollout.vllm.tensor_parallel_size=2", "rollout.cpus_per_replica=2"],
        ["rollout.vllm.tensor_parallel_size=2", "rollout.vllm.pipeline_parallel_size=2", "rollout.gpus_per_replica=4"],
    ],
)
def test_an_engine_with_what_its_processes_need_is_taken(overrides):
    check_engine_workers(config_of(*overrides).rollout)


def test_deepspeed_options_that_contradict_a_key_are_refused():
    check_training(config_of("train.deepspeed.zero_optimization.overlap_comm=true"))
    error = refused(check_training, config_of("train.deepspeed.gradient_clipping=3"))
    assert error.what == "train.deepspeed.gradient_clipping" and "train.max_grad_norm" in error.remedy


@pytest.mark.parametrize("part", ["offload_optimizer", "offload_param"])
def test_a_disk_for_optimizer_or_weights_is_refused_where_deepspeed_has_no_library_to_reach_it(monkeypatch, part):
    key = f"train.deepspeed.zero_optimization.{part}.device"
    config = config_of("train.zero_stage=3", f"{key}=nvme")
    monkeypatch.setattr("rlsys.plan.training.find_library", lambda name: "libaio.so.1")
    check_training(config)
    monkeypatch.setattr("rlsys.plan.training.find_library", lambda name: None)
    error = refused(check_training, config)
    assert (error.what, error.got) == (key, "'nvme' on a machine without libaio")
    assert refused(check_training, config_of("train.zero_stage=3", f"{key}=cpu")).remedy == "set train.offload instead"


def test_an_offloaded_optimizer_is_refused_where_it_cannot_be_compiled(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    words = ["train.zero_stage=2", "train.offload=optimizer"]
    assert "to compile" in refused(check_training, config_of(*words)).got
    check_training(config_of(*words, "train.optimizer={name: sgd}"))  # torch's own
    check_training(config_of(*words, "ray.address=10.0.0.1:6379"))  # another machine's compiler


def test_muon_is_refused_where_it_would_be_another_optimizer_in_another_layout():
    muon = "train.optimizer={name: muon}"
    check_training(config_of(muon, "train.max_grad_norm=0"))
    assert refused(check_training, config_of(muon)).what == "train.max_grad_norm=1"
    words = [muon, "train.max_grad_norm=0", "train.tensor_parallel=2"]
    assert refused(check_training, config_of(*words)).what == "train.tensor_parallel=2"


def test_what_is_set_for_training_is_told():
    words = ["train.schedule={name: wsd, floor: 0.1}", "train.dtype=bfloat16", "train.float32_head=true"]
    config = config_of(*words, "train.zero_stage=3", "train.offload=optimizer+params", "train.rewarm_steps=5")
    (sentence,) = [line for line in facts.of_run(config) if line.startswith("learner: ")]
    assert "ZeRO stage 3 in bfloat16 (head in float32); optimizer and params offloaded to the CPU; " in sentence
    assert sentence.endswith(
        "of adamw() at learning rate 1e-05, then wsd(floor=0.1), warming up for 5 steps after a resume"
    )


def test_gpus_are_refused_on_a_machine_without_them_unless_a_cluster_is_named(monkeypatch):
    import torch

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = refused(references.check_gpus, config_of("train.gpus_per_rank=1", "rollout.gpus_per_replica=1"))
    assert error.what == "rollout.gpus_per_replica" and "train.gpus_per_rank" in error.remedy
    references.check_gpus(config_of("train.gpus_per_rank=1", "ray.address=10.0.0.1:6379"))


# --- the token budget


class ByteTokenizer:
    """One token a byte, two around every text."""

    chat_template = None

    def __call__(self, text):
        return {"input_ids": [0, *text.encode(), 1]}


def test_the_longest_prompt_is_found_among_texts_and_messages():
    messages = ({"role": "system", "content": "abc"}, {"role": "user", "content": "defg"})
    contents = ["a" * 5, "b" * 7, messages, "a"]
    assert references.longest_prompt_tokens(ByteTokenizer(), contents) == len("abc\ndefg") + 2
    assert references.longest_prompt_tokens(ByteTokenizer(), contents[:2]) == 9


def test_every_sequence_fits_a_microbatch_and_the_models_context():
    config = config_of("rollout.max_tokens=10", "train.tokens_per_microbatch=30")
    references.check_token_budget(config, 20, 30)
    error = refused(lambda c: references.check_token_budget(c, 21, 64), config)
    assert error.what == "train.tokens_per_microbatch=30" and "at least 31" in error.wanted
    error = refused(lambda c: references.check_token_budget(c, 20, 29), config)
    assert error.what == "rollout.max_tokens=10" and "rollout.max_tokens=9" in error.remedy


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (("train.batch_by=sampled_tokens",), "set train.tokens_per_batch"),
        (("train.tokens_per_batch=4096",), "remove train.tokens_per_batch"),
        (
            (
                "train.batch_by=trained_tokens",
                "train.tokens_per_batch=63",
                "rollout.group_size=8",
                "rollout.max_tokens=8",
            ),
            "raise it",
        ),
    ],
)
def test_a_token_budget_goes_with_batches_of_tokens_and_holds_the_longest_group(keys, what):
    error = refused(checks.check_token_budget, config_of(*keys))
    assert error.what == "train.tokens_per_batch" and what in error.remedy


def test_c3po_divides_by_the_budget_of_a_step():
    config = config_of(
        "algo.preset=c3po", "train.batch_by=trained_tokens", "train.tokens_per_batch=8192", "rollout.max_tokens=64"
    )
    assert config.algo.aggregation.params == {"tokens": 4096}


# --- derived facts


def test_the_lead_bound_is_eta_plus_one_batches():
    config = config_of("rollout.max_staleness=2", "train.prompts_per_batch=4", "rollout.group_size=8")
    assert facts.lead_bound(config) == 96
    text = "\n".join(facts.of_run(config))
    assert "4 questions x 8 rollouts = 32 rollouts" in text and "(2 + 1) x 32 = 96 rollouts" in text


def test_a_batch_of_tokens_and_a_paced_age_are_told_as_they_are():
    keys = ("train.batch_by=sampled_tokens", "train.tokens_per_batch=4096", "rollout.max_tokens=64")
    text = "\n".join(facts.of_run(config_of(*keys, "rollout.age_policy=pace", "rollout.oversample=0.5")))
    assert "finished once 4,096 tokens were sampled" in text and "at most 24 groups are unfinished" in text
    assert "staleness/violations" in text


def test_an_open_number_of_engines_is_told_by_how_many_of_them_the_lead_fills():
    config = config_of(
        "rollout.replicas=auto", "rollout.slots=64", "rollout.max_staleness=2", "train.prompts_per_batch=4",
        "rollout.group_size=8",
    )  # fmt: skip
    text = "\n".join(facts.of_run(config))
    assert "engines: as many as the cluster holds beside the learner, 64 slots each; the lead bound fills 1.5" in text


def found_of(config: Config) -> facts.Found:
    questions = tuple(Question(content=str(number), answer=None, fields={}) for number in range(170))
    data = LoadedData(name="test", split=Split(train=questions[:160], held_out=questions[160:]))
    assert config.algo.loss is not None
    return facts.Found(
        rows=algorithm.check_rows(config),
        is_ratio_loss=config.algo.loss.name != "reinforce",
        source=PromptSource(data, seed=0, max_requeues=0),
        longest_prompt_tokens=6,
        pad_token_id=0,
        reward="exact match",
    )


def test_the_objective_is_told_in_words():
    keys = ("rollout.max_tokens=4", "train.tokens_per_microbatch=25", "run.steps=5", "train.steps_per_batch=1")
    config = config_of(*keys)
    text = "\n".join(facts.of_references(config, found_of(config)))
    assert "tis(cap=2.0) x ppo_clip(eps_low=0.2, eps_high=0.2) at the proximal anchor" in text
    assert "the loss's trust region never acts" in text and "REINFORCE x the correction" in text
    assert "6 prompt + 4 sampled = 10 tokens" in text and "holds 2 of that length" in text
    assert "one epoch is 10.0 batches, the run draws 0.50 epochs" in text


def test_with_several_optimizer_steps_a_batch_the_clip_is_not_said_to_be_idle():
    config = config_of("train.steps_per_batch=2", "algo.correction={name: none}", "algo.allow_uncorrected=true")
    text = "\n".join(facts.of_references(config, found_of(config)))
    assert "never acts" not in text and "without a correction" in text


# --- everything together


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A working folder with questions and a reward function, and the overrides that name them."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1), "level": n % 3} for n in range(100, 130)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text("def reward(prompt, completion, answer, level):\n    return 1.0\n")
    return ["data.task=null", "data.train_path=questions.jsonl", "data.eval_questions=10", "reward.path=mine.py:reward"]


def test_check_reads_questions_and_reward_and_tells_what_it_found(files, tmp_path):
    text = "\n".join(preflight(config_of(*files, "rollout.max_tokens=8")).sentences)
    assert "20 questions to train on, 10 held out" in text
    assert f"{tmp_path}/mine.py:reward" in text
    # six characters of text, one token each, between the user's and the assistant's mark
    assert "at most 8 prompt + 8 sampled = 16 tokens" in text
    assert list(tmp_path.iterdir()) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("data.train_path=none.jsonl", "none.jsonl"),
        ("data.prompt_key=question", "question"),
        ("data.eval_questions=30", "data.eval_questions"),
        ("reward.path=none.py:reward", "none.py"),
        ("reward.path=mine.py:rewrad", "mine.py"),
        ("reward.path=no_such_package:reward", "no_such_package"),
        ("reward.path=json:dumps", "reward.path"),
        ("train.tokens_per_microbatch=15", "train.tokens_per_microbatch"),
    ],
)
def test_what_a_config_points_at_wrongly_is_refused(files, override, what):
    error = refused(preflight, config_of(*files, "rollout.max_tokens=8", override))
    assert what in str(error)


def test_a_reward_that_wants_a_column_the_data_has_not_is_refused(files, tmp_path):
    (tmp_path / "other.py").write_text("def reward(prompt, completion, answer, levle):\n    return 1.0\n")
    error = refused(preflight, config_of(*files, "reward.path=other.py:reward"))
    assert "levle" in str(error) and "level" in error.remedy
