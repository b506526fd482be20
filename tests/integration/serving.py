"""A real vLLM engine on tiny models whose weights a test can tell apart, and transformers to compare it with."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rlsys.records import Probe, Turn, Version, WeightVersion
from rlsys.rollout.vllm_settings import VllmSettings, engine_environment
from rlsys.weights.probe import probe_sequences
from rlsys.weights.segment import SegmentWriter, segment_path

VOCAB = 256
END = 0
ENDING_STEP = 10  # the model of this step ends its answers soon, the others as good as never
PROMPT = [17, 4, 99, 230, 8]
MARKER, NEVER_PREPARE = "skip-repack", "never-prepare"
MARKER_VARIABLE = "RLSYS_TEST_SKIP_REPACK"
COMING_UP_VARIABLE = "RLSYS_TEST_COMING_UP"  # names the file in which a slow worker tells its process id


class WallClock:
    def now(self) -> float:
        return perf_counter()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def model_of(step: int) -> Qwen2ForCausalLM:
    """A random tied model; another one for every step, far from flat (logits of some units)."""
    torch.manual_seed(step)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # head dimension 32: the smallest that vLLM's CPU attention takes
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=END,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        # Dimension 0 of the residual stream is a constant that no layer writes to, so that the end token's embedding
        # there sets how likely the end is, whatever came before.
        embedding = model.get_input_embeddings().weight
        embedding[:, 0] = 2.0
        embedding[END, 0] = 10.0 if step == ENDING_STEP else -2.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
    return model


def logprobs_of(model: Qwen2ForCausalLM, token_ids: list[int], temperature: float = 1.0) -> np.ndarray:
    """Log-probability of each token under the tokens before it, float32 [T]; 0 for the first."""
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0, :-1].float() / temperature
    chosen = torch.log_softmax(logits, -1).gather(-1, torch.tensor(token_ids[1:])[:, None])[:, 0]
    return np.concatenate([[0.0], chosen.numpy()]).astype(np.float32)


def difference_of(turn: Turn, step: int, temperature: float = 1.0) -> np.ndarray:
    """Absolute difference to transformers under the model of ``step``, per token sampled after ``PROMPT``."""
    reference = logprobs_of(model_of(step), PROMPT + turn.token_ids_T.tolist(), temperature)[len(PROMPT) :]
    return np.abs(turn.behaviour_logprobs_T - reference)


def weights_of(step: int, *, path: Path, previous: int | None) -> WeightVersion:
    """Publish the model of ``step`` into the segment ``path``."""
    model, tokens = model_of(step), probe_sequences(VOCAB, seed=1)

    def probe(of: Qwen2ForCausalLM) -> Probe:
        return Probe(token_ids=tokens, logprobs=tuple(logprobs_of(of, sequence.tolist()) for sequence in tokens))

    writer = SegmentWriter(path, torch.float32)
    writer.write(dict(model.named_parameters()))  # a tied head is no parameter of its own
    return WeightVersion(
        version=Version(incarnation=0, step=step),
        segment=str(path),
        tensors=writer.finish(),
        probe=probe(model),
        previous_probe=None if previous is None else probe(model_of(previous)),
    )


def published(folder: Path, step: int, previous: int | None = None) -> WeightVersion:
    """The model of ``step``, in a segment in ``folder``."""
    return weights_of(step, path=segment_path("test", f"{step}", folder=folder), previous=previous)


@dataclass
class Bench:
    """The running engine, the event loop that it lives in, and the folder of its segments."""

    engine: Any
    run: Callable[..., Any]
    folder: Path
    marker: Path

    def ask(self, question: str) -> list[int]:
        """What ``tied_head_sabotage`` counts, of every worker."""
        answers: list[int] = self.run(self.engine._process.alive().collective_rpc(question))
        return answers

    def weights(self, step: int, previous: int | None = None) -> WeightVersion:
        return published(self.folder, step, previous)


@contextmanager
def serving_folder(folder: Path) -> Iterator[Path]:
    """Holds the model, the segments and the marker; the environment is the engines' own meanwhile."""
    model_of(0).save_pretrained(folder / "model")
    words = {f"w{index}": index for index in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0").save_pretrained(folder / "model")
    before = dict(os.environ)
    os.environ.update(engine_environment(cpus=1, gpus=0) | {MARKER_VARIABLE: str(folder / MARKER)})
    yield folder
    os.environ.clear()
    os.environ.update(before)


def settings_of(folder: Path, timeout_s: float, **others: Any) -> VllmSettings:
    return VllmSettings(
        model=str(folder / "model"),
        dtype="float32",
        max_model_len=960,
        slots=256,
        seed=0,
        start_timeout_s=300,
        timeout_s=timeout_s,
        **{"worker_extension": "tests.integration.tied_head_sabotage.WorkerExtension"} | others,
    )


@contextmanager
def running(name: str, folder: Path, timeout_s: float, sender: Any = None, **settings_: Any) -> Iterator[Bench]:
    from rlsys.rollout.vllm_engine import VllmEngine  # reads the environment when it is imported

    engine = VllmEngine(name, settings_of(folder, timeout_s, **settings_), sender)
    with asyncio.Runner() as runner:
        try:
            runner.run(engine.start())
            yield Bench(engine=engine, run=runner.run, folder=folder, marker=folder / MARKER)
        finally:
            runner.run(engine.stop())
