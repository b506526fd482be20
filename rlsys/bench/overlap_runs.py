"""The runs of ``rlsys bench overlap``: the same questions, answers of the same lengths and the same optimizer steps,
with rollouts and training overlapping more and more. Real engines on a random model that never ends by itself."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from rlsys.actors.inputs import Inputs
from rlsys.actors.run import run_training
from rlsys.bench.fixed_lengths import FixedLengthRollouts, answer_length
from rlsys.config.presets import resolve
from rlsys.config.schema import Config
from rlsys.errors import DONE, RlsysError
from rlsys.models.folder import write_folder
from rlsys.models.tiny.model import MAX_POSITIONS, VOCAB_SIZE, make_tokenizer
from rlsys.prompts.source import open_source
from rlsys.records import Prompt
from rlsys.rollout.play import Member, opening_tokens

SYNCHRONOUS, ONE_STEP_OFF, ASYNCHRONOUS, PARTIAL = "synchronous", "one_step_off", "asynchronous", "partial"
MODES: Mapping[str, Mapping[str, Any]] = {  # keys of the section ``rollout``
    SYNCHRONOUS: {"max_staleness": 0},
    ONE_STEP_OFF: {"max_staleness": 1, "update_mode": "drain", "age_policy": "pace"},
    ASYNCHRONOUS: {"max_staleness": 4, "update_mode": "drain", "age_policy": "pace"},
    PARTIAL: {"max_staleness": 4, "update_mode": "recompute", "age_policy": "pace"},
}
CORES = 2  # of the machine that is measured
RAY_RESOURCES = "RAY_OVERRIDE_RESOURCES"  # what Ray takes the machine for, whatever it finds


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much work there is.

    Attributes:
        steps: batches.
        prompts, group_size: questions in a batch, and answers to each.
        slots: rollouts at once on the engine.
        longest: tokens at which the longest answers are cut.
        tokens_per_microbatch: of the learner.
        width, layers: of the model, the width a multiple of 64; its other dimensions follow.
    """

    steps: int
    prompts: int
    group_size: int
    slots: int
    longest: int
    tokens_per_microbatch: int
    width: int
    layers: int


def make_model(folder: Path, sizes: Sizes) -> None:
    """A random model of the embedded one's kind. There is no end of sequence in it, so that an answer ends where it is
    cut."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    heads = sizes.width // 32  # the smallest that vLLM's attention takes on CPU
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=sizes.width,
        intermediate_size=3 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
        architectures=[Qwen2ForCausalLM.__name__],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    write_folder(folder, model, config, GenerationConfig(do_sample=True), tokenizer)


def config_of(mode: str, sizes: Sizes, root: Path, *, engine_threads: int = 1, learner_threads: int = 1) -> Config:
    """Of one run. Evaluation is one question before and one after, a checkpoint is only after the last step."""
    sections = {
        "run": {"name": f"overlap-{os.getpid()}-{mode}", "root": root, "steps": sizes.steps},
        "data": {"task": {"name": "reversed_sum"}, "eval_questions": 1},
        "reward": {"path": "rlsys.bench.fixed_lengths:parity"},
        "algo": {"preset": "rloo"},
        "rollout": {
            "group_size": sizes.group_size,
            "max_tokens": sizes.longest,
            "slots": sizes.slots,
            "cpus_per_replica": engine_threads,
            **MODES[mode],
        },
        "train": {
            "prompts_per_batch": sizes.prompts,
            "tokens_per_microbatch": sizes.tokens_per_microbatch,
            "lr": 1e-6,  # versions differ, and the model stays the same to all intents
            "cpus_per_rank": learner_threads,
        },
        "eval": {"every_steps": 0},
        "checkpoint": {"every_steps": 0},
        "observe": {"tensorboard": False, "rollouts_per_step": 0},
        "ray": {"address": "local", "dashboard": False},
    }
    return resolve(Config.model_validate(sections))


def inputs_of(config: Config, model_path: Path) -> Inputs:
    """What a run is built from; every call gives a source that begins anew."""
    source = open_source(config.data, config.run.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    assert config.reward.path is not None  # set in ``config_of``
    return Inputs(
        model_path=str(model_path),
        longest_prompt=len(opening_tokens(tokenizer, source.eval_prompts()[0].content)),  # all are as long
        pad_token_id=tokenizer.pad_token_id,
        reward_path=config.reward.path,
        source=source,
    )


def batches_of(config: Config, inputs: Inputs) -> list[list[Prompt]]:
    """The questions of each batch, as they are drawn. Takes them out of the source of ``inputs``."""
    return [[inputs.source.next() for _ in range(config.train.prompts_per_batch)] for _ in range(config.run.steps)]


def members_of(prompt: Prompt, config: Config) -> list[tuple[Member, int]]:
    """The rollouts of a question, each with the length of its answer, tokens."""
    members = [Member(name=str(index)) for index in range(config.rollout.group_size)]
    longest = config.rollout.max_tokens
    return [(member, answer_length(member.rollout_id(prompt.group_id), longest)) for member in members]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModeFigures:
    """What one run came to.

    Attributes:
        wall_s: from the first question to the commit of the last batch.
        batch_s: of it, a batch.
        trainer_idle, rollout_idle: shares of the time in which that side had nothing to do.
        staleness: of a trained rollout, mean, steps.
        published: versions.
        pause_s: in which the engine stood still for a new version, mean.
    """

    wall_s: float
    batch_s: float
    trainer_idle: float
    rollout_idle: float
    staleness: float
    published: int
    pause_s: float


def run_mode(config: Config, inputs: Inputs) -> ModeFigures:
    """Train the whole list. Raises RlsysError where the run fails, or did other work than it should have."""
    with _logical_cores(2 * CORES):
        result = run_training(config, inputs, rollout_actor=FixedLengthRollouts)
    if result.exit != DONE:
        raise RlsysError(f"the run {config.run.name} failed: {result.failure}")
    lines = (result.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return mode_figures([json.loads(line) for line in lines], result.figures, lengths_of(config, inputs))


def lengths_of(config: Config, inputs: Inputs) -> list[int]:
    """Of the answers of the whole list, tokens."""
    fresh = inputs_of(config, Path(inputs.model_path))
    return [
        length
        for prompts in batches_of(config, fresh)
        for prompt in prompts
        for _, length in members_of(prompt, config)
    ]


def mode_figures(
    steps: Sequence[Mapping[str, float]], result: Mapping[str, float], lengths: Sequence[int]
) -> ModeFigures:
    """From the lines of metrics.jsonl and from result.json.

    Args:
        lengths: sampled tokens of every rollout that should have been trained.

    Raises:
        RlsysError: the work was another one.
    """
    trained = int(result["rollouts"]), round(result["tokens_per_s"] * result["wall_s"])
    if trained != (len(lengths), sum(lengths)):
        raise RlsysError(
            f"{trained[0]} rollouts of {trained[1]} tokens were trained, wanted {len(lengths)} of {sum(lengths)}"
        )
    # the first step begins with the first question; after the last commit there is only a checkpoint
    wall_s = steps[-1]["time_s"] - steps[0]["time_s"] + steps[0]["timing_s/step"]
    pauses = [step["weights/pause_s"] for step in steps if "weights/pause_s" in step]
    return ModeFigures(
        wall_s=wall_s,
        batch_s=wall_s / len(steps),
        trainer_idle=result["idle/trainer"],
        rollout_idle=result["idle/rollout"],
        staleness=result["staleness/mean"],
        published=int(result["weights/published"]),
        pause_s=sum(pauses) / len(pauses),
    )


@contextmanager
def _logical_cores(cores: int) -> Iterator[None]:
    """A Ray cluster that starts meanwhile takes the machine for one with so many cores."""
    before = os.environ.get(RAY_RESOURCES)
    os.environ[RAY_RESOURCES] = json.dumps({"CPU": cores})
    try:
        yield
    finally:
        if before is None:
            del os.environ[RAY_RESOURCES]
        else:
            os.environ[RAY_RESOURCES] = before
