"""Every kind of wrong input is refused before anything starts: exit status 2, with what, got, wanted and remedy.

One table, a row a kind. Each row starts from a run that passes the checks and spoils one thing.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from rlsys import cli
from rlsys.models.tiny import make_tiny

CONFIG = """\
run: {name: first, root: runs, steps: 3}
model: {path: model}
data: {train_path: questions.jsonl, eval_questions: 10}
reward: {path: "rewards.py:score"}
rollout: {max_tokens: 8, group_size: 4}
train:
  prompts_per_batch: 4
  lr: 1.0e-4
"""
REWARDS = """\
limit = 3


def score(prompt, completion, answer, level):
    return float(completion == answer)


def swapped(completion, question):
    return 1.0


def graded(prompt, completion, answer, grade):
    return 1.0
"""
QUESTIONS = [{"prompt": f"{number}+1=", "answer": str(number + 1), "level": 1} for number in range(100, 130)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tiny(folder, warm_up=False)
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch, model) -> Path:
    """A working folder with all that a run needs; importing what starts one would raise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "rlsys.actors.run", None)
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "rewards.py").write_text(REWARDS)
    write_questions(QUESTIONS)
    shutil.copytree(model, tmp_path / "model")
    return tmp_path


def write_questions(rows: list[dict[str, object]], after: str = "") -> None:
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + after)


def in_config(old: str, new: str) -> Callable[[], object]:
    def spoil() -> None:
        assert old in CONFIG
        Path("config.yaml").write_text(CONFIG.replace(old, new))

    return spoil


def in_model(**keys: object) -> Callable[[], object]:
    """Other values in the model's config.json."""

    def spoil() -> None:
        path = Path("model/config.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    return spoil


def without(*patterns: str) -> Callable[[], object]:
    def spoil() -> None:
        for pattern in patterns:
            for path in Path().glob(pattern):
                path.unlink()

    return spoil


def cut_short(path: str, num_bytes: int) -> Callable[[], object]:
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[:-num_bytes])


def another_run() -> None:
    """A run of the same name that has trained a batch under another config."""
    Path("runs/first").mkdir(parents=True)
    Path("runs/first/config.yaml").write_text(CONFIG.replace("steps: 3", "steps: 4"))
    Path("runs/first/metrics.jsonl").write_text("{}\n")


def something_else() -> None:
    Path("runs/first").mkdir(parents=True)
    Path("runs/first/thesis.tex").touch()


def file_as_run_folder() -> None:
    Path("runs").mkdir()
    Path("runs/first").touch()


def refuse_system_role() -> None:
    """Most questions are text; the last one begins with a role that the model's template does not take."""
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    Path("model/chat_template.jinja").write_text(template + "{{ m.content }}{% endfor %}")
    conversation = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1="}]
    write_questions([*QUESTIONS, {"prompt": conversation, "answer": "2", "level": 1}])


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Row:
    """What is spoilt, by ``spoil`` and by words on the command line, and the words that the refusal must hold."""

    name: str
    what: str
    got: str
    wanted: str
    remedy: str
    spoil: Callable[[], object] = nothing
    words: tuple[str, ...] = ()
    free: tuple[float, float] | None = None  # bytes of shared memory and of disk; None: as it is


CONFIG_ROWS = [
    Row("a text for a number", "run.steps", "'many' (command line", "integer", "Default: 20",
        words=("run.steps=many",)),
    Row("a wrong type in the file", "train.lr", "'fast' (config.yaml, line 8)", "number", "Learning rate",
        in_config("1.0e-4", "fast")),
    Row("a seed below zero", "run.seed", "-1", "greater than or equal to 0", "Seed", words=("run.seed=-1",)),
    Row("a name too long", "run.name", "aaa", "at most 100 characters", "its folder", words=("run.name=" + "a" * 101,)),
    Row("a path too long", "run.root", "aaa", "a path", "correct the path", words=("run.root=" + "a" * 256,)),
    Row("brackets without end", "config.yaml", "without end", "sections with keys", "surplus brackets",
        lambda: Path("config.yaml").write_text("[" * 20_000)),
    Row("an alias that holds itself", "config.yaml", "without end", "sections with keys", "the alias",
        lambda: Path("config.yaml").write_text("run: &a\n  name: *a\n")),
    Row("out of range", "train.lr", "0", "greater than 0", "Learning rate", words=("train.lr=0",)),
    Row("none of the choices", "rollout.age_policy", "'keep'", "'drop', 'mask' or 'pace'", "Default: drop",
        words=("rollout.age_policy=keep",)),
    Row("neither a number nor auto", "rollout.replicas", "0 (command line", "a whole number from 1 on, or auto",
        "Default: 1", words=("rollout.replicas=0",)),
    Row("open replicas that take no room", "rollout.replicas=auto", "neither CPUs nor GPUs", "above 0",
        "set one of them", words=("rollout.replicas=auto", "rollout.cpus_per_replica=0")),
    Row("an unknown key", "rollout.max_stalness", "unknown key", "rollout.replicas",
        "did you mean rollout.max_staleness?", words=("rollout.max_stalness=1",)),
    Row("an unknown section", "trian", "config.yaml, line 6", "train", "did you mean train?",
        in_config("train:", "trian:")),
    Row("a key of another section", "run.lr", "unknown key", "run.steps", "did you mean train.lr?",
        words=("run.lr=1",)),
    Row("a key written twice", "config.yaml, line 8", "'prompts_per_batch' is written twice", "every key once",
        "correct that line", in_config("lr: 1.0e-4", "prompts_per_batch: 8")),
    Row("no YAML", "config.yaml, line 2", "expected", "valid YAML", "correct that line",
        in_config("steps: 3}", "steps: 3")),
    Row("no mapping", "config.yaml", "a list", "sections with keys", "below their sections",
        lambda: Path("config.yaml").write_text("- run\n")),
    Row("no config file", "config.yaml", "No such file", "readable YAML", "check the path", without("config.yaml")),
    Row("a word without an equals sign", "override 'steps'", "no key=value", "rollout.max_staleness=0", "equals sign",
        words=("steps",)),
    Row("two sources of questions", "data.train_path and data.task", "both", "exactly one", "remove one",
        words=("data.task={name: reversed_sum}",)),
    Row("no source of questions", "data.train_path and data.task", "neither", "exactly one",
        "data.task={name: reversed_sum}", words=("data.train_path=null",)),
    Row("staleness without a correction", "algo.correction", "rollout.max_staleness=2", "correction",
        "allow_uncorrected", words=("rollout.max_staleness=2", "algo.correction={name: none}")),
    Row("more optimizer steps than rollouts", "train.steps_per_batch=17", "16 rollouts", "at least 17",
        "lower train.steps_per_batch", words=("train.steps_per_batch=17",)),
    Row("pass@k of fewer samples", "eval.pass_at", "k = 4", "1 to eval.samples", "raise eval.samples",
        words=("eval.samples=2",)),
    Row("an unknown loss", "algo.loss.name", "'ppo_clop'", "ppo_clip", "did you mean ppo_clip?",
        words=("algo.loss={name: ppo_clop}",)),
    Row("an unknown parameter of a loss", "algo.loss.eps_hihg", "no such parameter", "eps_high",
        "did you mean eps_high?", words=("algo.loss={name: ppo_clip, eps_hihg: 0.3}",)),
    Row("a parameter of the wrong type", "algo.correction.cap", "'two'", "a float", "default is",
        words=("algo.correction={name: tis, cap: two}",)),
    Row("a parameter out of range", "algo.correction", "tis(cap=-1)", "values in range", "docstring of tis",
        words=("algo.correction={name: tis, cap: -1}",)),
    Row("a vLLM option that there is not", "rollout.vllm.blok_size", "no argument", "AsyncEngineArgs",
        "did you mean block_size?", words=("rollout.vllm.blok_size=16",)),
    Row("a vLLM option that rlsys sets", "rollout.vllm.max_num_seqs", "4", "does not set itself", "rollout.slots",
        words=("rollout.vllm.max_num_seqs=4",)),
    Row("a DeepSpeed option that contradicts a key", "train.deepspeed.gradient_clipping", "3", "1.0, or no entry",
        "train.max_grad_norm", words=("train.deepspeed.gradient_clipping=3",)),
    Row("a DeepSpeed option that cannot be", "train.deepspeed.fp16.enabled", "True", "no entry", "bfloat16",
        words=("train.deepspeed.fp16.enabled=true",)),
    Row("a DeepSpeed section of another form", "train.deepspeed.bf16", "True", "a mapping", "keys below it",
        words=("train.deepspeed.bf16=true",)),
    Row("an optimizer past its key", "train.deepspeed.optimizer", "'Adam'", "no entry", "train.optimizer",
        words=("train.deepspeed.optimizer=Adam",)),
    Row("an unknown optimizer", "train.optimizer.name", "'adamww'", "one of adamw", "did you mean adamw?",
        words=("train.optimizer.name=adamww",)),
    Row("an optimizer that is gone", "train.optimizer.name", "'onebit_adam'", "one of adamw", "no longer",
        words=("train.optimizer.name=onebit_adam",)),
    Row("an unknown setting of a schedule", "train.schedule.flor", "no such parameter", "floor", "did you mean floor?",
        words=("train.schedule={name: cosine, flor: 0.1}",)),
    Row("betas of an optimizer that has none", "train.betas", "sgd", "no value", "leave it out",
        words=("train.optimizer={name: sgd}", "train.betas=[0.9, 0.99]")),
    Row("an offloaded optimizer of ZeRO stage 0", "train.offload=optimizer", "stage 0", "stage 1, 2 or 3",
        "train.zero_stage=2", words=("train.offload=optimizer",)),
    Row("offloaded weights of ZeRO stage 2", "train.offload=optimizer+params", "stage 2", "stage 3",
        "train.zero_stage=3", words=("train.offload=optimizer+params", "train.zero_stage=2")),
    Row("Lion on CPU", "train.optimizer.name", "'lion' on CPU", "an optimizer that runs there", "train.offload",
        words=("train.optimizer={name: lion}",)),
    Row("a float32 head of a float32 model", "train.float32_head", "train.dtype=float32", "bfloat16", "leave it out",
        words=("train.float32_head=true",)),
    Row("quantised ZeRO++ on CPU", "train.deepspeed.zero_optimization.zero_quantized_weights", "True", "GPU",
        "leave it out", words=("train.deepspeed.zero_optimization.zero_quantized_weights=true",)),
    Row("GPUs where there are none", "train.gpus_per_rank", "torch sees none", "0 here", "ray.address",
        words=("train.gpus_per_rank=1",)),
]  # fmt: skip

MODEL_ROWS = [
    Row("no model folder", "model.path", "none is no folder", "Hugging Face folder", "make-model",
        words=("model.path=none",)),
    Row("a model without config", "model.path", "config.json", "config.json of a Hugging Face model",
        "save_pretrained", without("model/config.json")),
    Row("a model without tokenizer", "model.path", "no tokenizer in", "tokenizer.json", "save_pretrained",
        without("model/tokenizer*")),
    Row("a tokenizer that does not load", "model.path", "does not load", "tokenizer", "save_pretrained",
        lambda: Path("model/tokenizer.json").write_text("{")),
    Row("a tokenizer of another shape", "model.path", "does not load", "tokenizer", "save_pretrained",
        lambda: Path("model/tokenizer.json").write_text("[]")),
    Row("a value of the model of the wrong type", "model.path", "num_hidden_layers", "values that", "save_pretrained",
        in_model(num_hidden_layers="many")),
    Row("a chat template that does not parse", "the chat template", "TemplateSyntaxError", "renders every question",
        "correct the template", lambda: Path("model/chat_template.jinja").write_text("{% for message %}")),
    Row("a chat template that refuses a role", "the chat template",
        "no system role, on a question of the roles system, user",
        "renders every question", "the roles in the data", refuse_system_role),
    Row("a model without weights", "model.path", "no weights in", "safetensors", "download the model's weights",
        without("model/*.safetensors")),
    Row("weights cut short", "model.path", "model.safetensors: a file of", "whole safetensors files",
        "download the model's weights again", cut_short("model/model.safetensors", 1)),
    Row("an unknown architecture", "model.path", "'qwen22'", "causal LM", "did you mean qwen2?",
        in_model(model_type="qwen22")),
    Row("an architecture that the engines lack", "model.path", "architecture 'Qwen22ForCausalLM'",
        "the installed vLLM serves", "did you mean Qwen2ForCausalLM?", in_model(architectures=["Qwen22ForCausalLM"])),
    Row("a quantised model", "model.path", "gptq", "cannot be trained", "dequantise",
        in_model(quantization_config={"quant_method": "gptq"})),
    Row("a weight file that is not there", "model.path", "1 of its 1 files missing: other.safetensors",
        "every file of weights", "download the model's weights again",
        lambda: Path("model/model.safetensors.index.json").write_text('{"weight_map": {"a": "other.safetensors"}}')),
    Row("prompts longer than the context", "rollout.max_tokens=8", "16 tokens: the longest prompt has 8 tokens",
        "at most 10", "remove long prompts", in_model(max_position_embeddings=10)),
    Row("too small a token budget", "train.tokens_per_microbatch=15", "16 tokens", "at least 16",
        "train.tokens_per_microbatch=16", words=("train.tokens_per_microbatch=15",)),
    Row("too little shared memory", "/dev/shm", "1.0 MiB free", "8.0 MiB: 2 weight versions of 804,992", "--shm-size",
        free=(1 << 20, 1e12)),
    Row("too small a disk", "run.root", "1.0 MiB free", "3 checkpoints (checkpoint.keep + 1)",
        "lower checkpoint.keep", free=(1e12, 1 << 20)),
]  # fmt: skip

DATA_ROWS = [
    Row("no data file", "none.jsonl", "no such file", "JSONL, parquet or Arrow", "Check the path",
        words=("data.train_path=none.jsonl",)),
    Row("no held-out file", "data.eval_path", "no such file", "JSONL, parquet or Arrow", "Check the path",
        words=("data.eval_path=none.jsonl",)),
    Row("a file of another kind", "rewards.py", "'.py'", ".jsonl", "Convert the file",
        words=("data.train_path=rewards.py",)),
    Row("a folder without data", "model", "a folder without data", "file of questions", "holds the files",
        words=("data.train_path=model",)),
    Row("no question", "questions.jsonl", "no questions", "at least one", "Fill the file",
        lambda: write_questions([])),
    Row("no prompt column", "questions.jsonl, line 1", "the columns question, answer", "a column 'prompt'",
        "data.prompt_key=question", lambda: write_questions([{"question": "a", "answer": "b"}])),
    Row("a broken line", "questions.jsonl, line 31", "no JSON", "one JSON object a line",
        "Correct or remove the line", lambda: write_questions(QUESTIONS, after='{"prompt": ')),
    Row("a line of another shape", "questions.jsonl, line 31", "a JSON list", "a JSON object", "on a line of its own",
        lambda: write_questions(QUESTIONS, after='["prompt"]')),
    Row("a prompt of the wrong type", "questions.jsonl, line 1", "'prompt' holds int 5", "text", "data.prompt_key",
        lambda: write_questions([{"prompt": 5}])),
    Row("an empty prompt", "questions.jsonl, line 1", "'prompt' holds str ''", "not empty", "Correct or remove",
        lambda: write_questions([{"prompt": ""}])),
    Row("a column named as an argument", "questions.jsonl, line 1", "'completion'", "otherwise than", "Rename",
        lambda: write_questions([{"prompt": "a", "completion": "b"}])),
    Row("an answer column that no key names", "questions.jsonl, line 1", "'answer'", "otherwise than",
        "data.answer_key", words=("data.answer_key=solution",)),
    Row("no answer to compare with", "data.answer_key", "no answer to 30 of 30", "exact_match", "data.answer_key",
        lambda: write_questions([{"prompt": q["prompt"]} for q in QUESTIONS]), ("reward.path=null",)),
    Row("an answer column that there is not", "questions.jsonl", "'solution'", "data.answer_key",
        "Correct data.answer_key", lambda: write_questions([{"prompt": "a", "proof": "b"}]),
        ("data.answer_key=solution",)),
    Row("more questions held out than there are", "data.eval_questions=30", "30 questions", "more distinct questions",
        "Lower data.eval_questions", words=("data.eval_questions=30",)),
    Row("a task of no size", "data.task", "'size': -1", "LegCountingConfig takes", "Correct the value",
        words=("data.train_path=null", "data.task={name: reasoning_gym.leg_counting, size: -1}")),
    Row("an unknown task", "data.task", "reversed_sums", "reversed_sum", "Did you mean reversed_sum?",
        words=("data.train_path=null", "data.task={name: reversed_sums}")),
]  # fmt: skip

REWARD_ROWS = [
    Row("no reward file", "reward.path", "no file", "Python file", "Correct the path",
        words=("reward.path=none.py:score",)),
    Row("no reward module", "reward.path", "No module named 'no_such'", "can be imported", "installed",
        words=("reward.path=no_such:score",)),
    Row("a reward that does not parse", "reward.path", "line 2", "can be imported", "Correct what the error names",
        lambda: Path("rewards.py").write_text("\ndef score(:\n")),
    Row("a reward path without a function", "reward.path", "'rewards.py'", "file.py:function", "after a colon",
        words=("reward.path=rewards.py",)),
    Row("no such reward function", "reward.path", "no function 'scroe'", "def reward(", "Did you mean score?",
        words=("reward.path=rewards.py:scroe",)),
    Row("a reward that is no function", "reward.path", "limit is no function: 3", "def reward(",
        "Choose one of its functions", words=("reward.path=rewards.py:limit",)),
    Row("a reward of another signature", "reward.path", "def swapped(completion, question)",
        "def reward(prompt, completion, answer", "by keyword", words=("reward.path=rewards.py:swapped",)),
    Row("a reward that wants another column", "reward.path: argument 'grade'", "level", "a column 'grade'",
        "Rename the argument", words=("reward.path=rewards.py:graded",)),
]  # fmt: skip

FOLDER_ROWS = [
    Row("a run of another config", "run.name=first", "another config (", "new run folder", "rm -r", another_run),
    Row("a folder of other things", "run.name=first", "thesis.tex", "new run folder", "another run.name",
        something_else),
    Row("a file in place of the run folder", "run.name=first", "is a file", "new run folder", "another run.name",
        file_as_run_folder),
    Row("a file in place of the folder of runs", "run.root", "config.yaml is a file", "a folder", "set run.root",
        words=("run.root=config.yaml",)),
]  # fmt: skip

ROWS = [*CONFIG_ROWS, *MODEL_ROWS, *DATA_ROWS, *REWARD_ROWS, *FOLDER_ROWS]


def everything_in(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


def test_what_the_rows_spoil_passes_the_checks(folder):
    result = CliRunner().invoke(cli.app, ["check", "config.yaml"])
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_wrong_input_is_refused_with_what_got_wanted_and_remedy(row: Row, command: str, folder: Path, monkeypatch):
    row.spoil()
    if row.free is not None:
        shm, disk = row.free
        free = SimpleNamespace
        monkeypatch.setattr("rlsys.plan.space.stale_segments", lambda: ())
        monkeypatch.setattr(shutil, "disk_usage", lambda path: free(free=shm if str(path) == "/dev/shm" else disk))
    before = everything_in(folder)

    result = CliRunner().invoke(cli.app, [command, "config.yaml", *row.words])

    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    parts = re.fullmatch(
        r"config error: (.+)\n  got:    (.+)\n  wanted: (.+)\n  remedy: (.+)\n", result.stderr, flags=re.DOTALL
    )
    assert parts is not None, result.stderr
    for found, words in zip(parts.groups(), (row.what, row.got, row.wanted, row.remedy), strict=True):
        assert words in found and found.strip(), result.stderr
    assert everything_in(folder) == before
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
