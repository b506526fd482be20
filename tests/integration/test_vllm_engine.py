"""The real engine: exact log-probabilities, exact version stamps, swaps in flight, and law 3 (proven weights only).

One vLLM engine serves most of the file, in the order of the tests; law 3 ends its life.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rlsys.errors import EngineLost, RequestRefused, WeightsRefused
from rlsys.records import Probe, StopReason, Turn, Version, WeightVersion
from rlsys.rollout.engine import GenerateRequest
from rlsys.rollout.vllm_settings import VllmSettings, engine_environment
from rlsys.weights.probe import probe_sequences
from rlsys.weights.segment import SegmentWriter, segment_path
from tests.engine_contract import check_engine_contract
from tests.integration.tied_head_sabotage import MARKER_VARIABLE

pytestmark = pytest.mark.engines

VOCAB = 256
END = 0
ENDING_STEP = 10  # the model of this step ends its answers soon, the others as good as never
NUM_LONG = 560  # tokens of a request that lives through a swap
PROMPT = [17, 4, 99, 230, 8]


class WallClock:
    def now(self) -> float:
        return perf_counter()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def _model(step: int) -> Qwen2ForCausalLM:
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


def _logprobs(model: Qwen2ForCausalLM, token_ids: list[int], temperature: float = 1.0) -> np.ndarray:
    """Log-probability of each token under the tokens before it, float32 [T]; 0 for the first."""
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0, :-1].float() / temperature
    chosen = torch.log_softmax(logits, -1).gather(-1, torch.tensor(token_ids[1:])[:, None])[:, 0]
    return np.concatenate([[0.0], chosen.numpy()]).astype(np.float32)


def _weights(step: int, *, path: Path, previous: int | None) -> WeightVersion:
    """Publish the model of ``step`` into the segment ``path``."""
    model, tokens = _model(step), probe_sequences(VOCAB, seed=1)

    def probe(of: Qwen2ForCausalLM) -> Probe:
        return Probe(token_ids=tokens, logprobs=tuple(_logprobs(of, sequence.tolist()) for sequence in tokens))

    writer = SegmentWriter(path, torch.float32)
    for name, parameter in model.named_parameters():  # a tied head is no parameter of its own
        writer.write(name, parameter)
    return WeightVersion(
        version=Version(incarnation=0, step=step),
        segment=str(path),
        tensors=writer.finish(),
        probe=probe(model),
        previous_probe=None if previous is None else probe(_model(previous)),
    )


@dataclass
class Bench:
    """The running engine, the event loop that it lives in, and the folder of its segments."""

    engine: object
    run: Callable
    folder: Path
    marker: Path

    def weights(self, step: int, previous: int | None = None) -> WeightVersion:
        return _weights(step, path=segment_path("test", f"{step}", folder=self.folder), previous=previous)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Holds the model, the segments and the marker; the environment is the engines' own meanwhile."""
    folder = tmp_path_factory.mktemp("engine")
    _model(0).save_pretrained(folder / "model")
    words = {f"w{index}": index for index in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0").save_pretrained(folder / "model")
    before = dict(os.environ)
    os.environ.update(engine_environment(cpus=1, gpus=0) | {MARKER_VARIABLE: str(folder / "skip-repack")})
    yield folder
    os.environ.clear()
    os.environ.update(before)


@contextmanager
def _running(name: str, folder: Path, timeout_s: float) -> Iterator[Bench]:
    from rlsys.rollout.vllm_engine import VllmEngine  # reads the environment when it is imported

    settings = VllmSettings(
        model=str(folder / "model"),
        dtype="float32",
        max_model_len=640,
        slots=256,
        seed=0,
        start_timeout_s=300,
        timeout_s=timeout_s,
        worker_extension="tests.integration.tied_head_sabotage.WorkerExtension",
    )
    engine = VllmEngine(name, settings)
    with asyncio.Runner() as runner:
        try:
            runner.run(engine.start())
            yield Bench(engine=engine, run=runner.run, folder=folder, marker=folder / "skip-repack")
        finally:
            runner.run(engine.stop())


@pytest.fixture(scope="module")
def bench(folder) -> Iterator[Bench]:
    with _running("rollout-0", folder, timeout_s=120) as bench:
        yield bench


def _request(name: str, max_tokens: int = 32, *, temperature: float = 1.0, seed: int = 3) -> GenerateRequest:
    return GenerateRequest(request_id=name, token_ids=PROMPT, max_tokens=max_tokens, temperature=temperature, seed=seed)


def _difference(turn: Turn, step: int, temperature: float = 1.0) -> np.ndarray:
    """Absolute difference to transformers under the model of ``step``, per sampled token."""
    reference = _logprobs(_model(step), PROMPT + turn.token_ids_T.tolist(), temperature)[len(PROMPT) :]
    return np.abs(turn.behaviour_logprobs_T - reference)


def test_vllm_engine_obeys_the_contract_and_stamps_every_token_with_what_sampled_it(bench):
    first, second = bench.weights(1), bench.weights(2, previous=1)
    turn = bench.run(
        check_engine_contract(
            bench.engine,
            first=first,
            second=second,
            refused=replace(bench.weights(3), segment=str(bench.folder / "gone")),
            request=_request("contract", NUM_LONG),
            clock=WallClock(),
        )
    )
    is_first = turn.versions_T == first.version.code
    assert _difference(turn, 1)[is_first].max() < 1e-3
    assert _difference(turn, 2)[~is_first].max() < 1e-3
    assert _difference(turn, 1)[~is_first].mean() > 0.1  # the two are far enough apart for the test to mean something


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_sampling_distribution(bench, temperature):
    turn = bench.run(bench.engine.generate(_request("exact", 64, temperature=temperature)))
    assert len(turn.token_ids_T) == 64 and turn.stop_reason is StopReason.LENGTH
    assert _difference(turn, 2, temperature).max() < 1e-4
    if temperature != 1.0:
        assert _difference(turn, 2, 1.0).max() > 0.1


def test_an_answer_ends_with_the_end_token_and_says_so(bench):
    bench.run(bench.engine.load_weights(bench.weights(ENDING_STEP, previous=2)))
    turns = bench.run(_gather([bench.engine.generate(_request(f"e{seed}", 200, seed=seed)) for seed in range(8)]))
    for turn in turns:
        assert turn.stop_reason is StopReason.EOS
        assert turn.token_ids_T[-1] == END and END not in turn.token_ids_T[:-1]
    assert max(len(turn.token_ids_T) for turn in turns) > 1


def test_a_swap_with_more_context_in_flight_than_fits_into_a_batch_keeps_every_token_exact(bench):
    """64 requests at some 60 tokens each are prefilled again: more than vLLM's batch of 2048 tokens."""

    async def play() -> list[Turn]:
        return await _gather([bench.engine.generate(_request(f"load{seed}", 120, seed=seed)) for seed in range(64)])

    async def swap_under_load() -> list[Turn]:
        await bench.engine.load_weights(bench.weights(1, previous=ENDING_STEP))
        second = bench.weights(2, previous=1)
        started = perf_counter()
        await play()
        seconds = perf_counter() - started
        in_flight = asyncio.create_task(play())
        await asyncio.sleep(seconds / 2)
        await bench.engine.load_weights(second)
        return await in_flight

    turns = bench.run(swap_under_load())
    in_flight_tokens = [np.count_nonzero(turn.versions_T == 1) for turn in turns]
    assert sum(in_flight_tokens) + len(PROMPT) * len(turns) > 2048
    assert min(in_flight_tokens) > 0 and max(in_flight_tokens) < 120
    for turn in turns:
        is_first = turn.versions_T == 1
        assert _difference(turn, 1)[is_first].max() < 1e-3
        assert _difference(turn, 2)[~is_first].max() < 1e-3


def test_a_prompt_beyond_the_context_is_refused_and_the_engine_goes_on(bench):
    too_long = replace(_request("long"), token_ids=[5] * 700)
    with pytest.raises(RequestRefused, match="rollout-0"):
        bench.run(bench.engine.generate(too_long))
    with pytest.raises(RequestRefused):
        bench.run(bench.engine.generate(replace(_request("alien"), token_ids=[VOCAB + 44])))
    assert len(bench.run(bench.engine.generate(_request("fine", 4))).token_ids_T) > 0


def test_a_corrupted_byte_is_refused_by_name_and_the_old_version_is_served_on(bench):
    served = bench.engine.version
    weights = bench.weights(3)
    entry = next(entry for entry in weights.tensors if entry.name == "model.layers.1.mlp.down_proj.weight")
    data = bytearray(Path(weights.segment).read_bytes())
    data[entry.offset + entry.num_bytes - 1] ^= 1
    Path(weights.segment).write_bytes(data)
    with pytest.raises(WeightsRefused, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        bench.run(bench.engine.load_weights(weights))
    assert bench.engine.version == served
    turn = bench.run(bench.engine.generate(_request("after", 4)))
    assert set(turn.versions_T) == {served.code}


def test_a_tied_head_that_was_not_packed_again_is_caught_and_the_engine_serves_nothing_more(bench):
    good, bad = bench.weights(4), bench.weights(5, previous=4)

    async def swap_badly() -> list[Turn | BaseException]:
        await bench.engine.load_weights(good)
        bench.marker.touch()
        # lengths so that some end before the swap, some while it is proven, and some would run on
        lengths = [1, 40, 80, 120, 160, 200, 240, 280, 320, NUM_LONG]
        requests = [_request(f"s{length}", length) for length in lengths]
        in_flight = asyncio.gather(*map(bench.engine.generate, requests), return_exceptions=True)
        await asyncio.sleep(0.1)
        with pytest.raises(WeightsRefused, match="differ from the learner's"):
            await bench.engine.load_weights(bad)
        return await asyncio.wait_for(in_flight, 10)

    outcomes = bench.run(swap_badly())
    assert isinstance(outcomes[-1], EngineLost) and "failed its proof" in str(outcomes[-1])
    turns = [outcome for outcome in outcomes if isinstance(outcome, Turn)]
    assert len(turns) + sum(isinstance(outcome, EngineLost) for outcome in outcomes) == len(outcomes)
    assert {code for turn in turns for code in turn.versions_T} <= {good.version.code}
    assert bench.engine.version == good.version
    with pytest.raises(EngineLost, match="rollout-0"):
        bench.run(bench.engine.generate(_request("late", 4)))
    bench.marker.unlink()
    with pytest.raises(EngineLost):
        bench.run(bench.engine.load_weights(bench.weights(6)))


def test_an_engine_that_hangs_is_lost_within_the_deadline(folder):
    others = multiprocessing.active_children()
    with _running("rollout-1", folder, timeout_s=2) as bench:
        (process,) = [child for child in multiprocessing.active_children() if child not in others]
        bench.run(bench.engine.load_weights(bench.weights(1)))

        async def hang() -> list[BaseException]:
            in_flight = asyncio.gather(
                *(bench.engine.generate(_request(f"h{seed}", NUM_LONG, seed=seed)) for seed in range(3)),
                return_exceptions=True,
            )
            await asyncio.sleep(0.1)
            os.kill(process.pid, signal.SIGSTOP)
            return await asyncio.wait_for(in_flight, 10)

        assert all("waited 2 s for request h0 on engine rollout-1" in str(outcome) for outcome in bench.run(hang()))
        with pytest.raises(EngineLost, match="rollout-1"):
            bench.run(bench.engine.load_weights(bench.weights(2)))
    process.join(5)
    assert not process.is_alive()


async def _gather(coroutines: list[Coroutine[Any, Any, Turn]]) -> list[Turn]:
    return await asyncio.gather(*coroutines)
