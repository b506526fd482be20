"""Any causal LM in a Hugging Face folder: proved on the engine, trained two steps, swapped in, saved.

Every architecture lives its life once; the laws below are read from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsys.config.load import apply_overrides
from rlsys.config.schema import Config
from rlsys.plan.model_folder import check_model_folder, check_vocabulary, load_tokenizer
from rlsys.records import Rollout, StopReason
from tests.models.architecture_life import Life, Lives
from tests.models.tiny_architectures import ARCHITECTURES, BOS, TURN_START, make_folder

pytestmark = [pytest.mark.engines, pytest.mark.parametrize("name", ARCHITECTURES)]

ENGINE_AND_LEARNER = 1e-4  # nats, float32
MOVED = 1e-2  # nats: by less, an engine that kept old weights could hide in the bound above


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("architectures")


@pytest.fixture(scope="module")
def lives(request: pytest.FixtureRequest, folders: Path) -> Iterator[Mapping[str, Future[Life]]]:
    """Of the rows that were asked for; two at a time."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    names = dict.fromkeys(str(item.callspec.params["name"]) for item in items)
    processes = Lives(2)
    try:
        futures = {}
        for name in names:
            make_folder(ARCHITECTURES[name], folders / name)
            futures[name] = processes.begin(folders / name, folders / f"{name}-saved", ARCHITECTURES[name].zero_stage)
        yield futures
    finally:
        processes.stop()


@pytest.fixture
def life(lives: Mapping[str, Future[Life]], name: str) -> Life:
    return lives[name].result()


def plain_logprobs(folder: Path, rollouts: list[Rollout]) -> list[np.ndarray]:
    """Of every token but the first, by plain transformers with the attention that leaves nothing out."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    logprobs = []
    for rollout in rollouts:
        token_ids = torch.from_numpy(rollout.token_ids_T).long()
        with torch.no_grad():
            table = torch.log_softmax(model(token_ids[None]).logits[0, :-1], dim=-1)
        logprobs.append(table.gather(1, token_ids[1:, None])[:, 0].numpy())
    return logprobs


def largest_gap(rollouts: list[Rollout], logprobs: list[np.ndarray]) -> float:
    """Between the engine's log-probabilities of sampled tokens and other ones ([T - 1], without the first token)."""
    return max(
        float(np.abs(rollout.behaviour_logprobs_T[1:] - other)[rollout.loss_mask_T[1:]].max())
        for rollout, other in zip(rollouts, logprobs, strict=True)
    )


def test_the_folder_passes_the_preflight(life, folders, name):
    config = apply_overrides(Config(), [f"model.path={folders / name}"])
    check_vocabulary(load_tokenizer(config), check_model_folder(config))


def test_an_engine_proves_the_first_weights_and_the_trained_ones(life):
    assert max(load.probe_difference for load in life.loads) < ENGINE_AND_LEARNER
    before, after = (np.concatenate([logprobs_T[1:] for logprobs_T in probe.logprobs]) for probe in life.probes)
    assert np.abs(before - after).mean() > MOVED


def test_samples_are_those_of_the_version_that_they_are_stamped_with(life, folders, name):
    first = plain_logprobs(folders / name, life.before)
    assert largest_gap(life.before, first) < ENGINE_AND_LEARNER
    assert largest_gap(life.after, [logprobs_T[1:] for logprobs_T in life.learner_logprobs]) < ENGINE_AND_LEARNER
    assert largest_gap(life.after, plain_logprobs(folders / name, life.after)) > MOVED
    assert {code for rollout in life.after for code in rollout.versions_T[rollout.loss_mask_T]} == {2}


def test_the_learner_computes_in_packed_rows_what_the_engine_sampled_from(life):
    assert life.num_shared_rows >= 2
    first, second = life.metrics
    assert first["rollout_corr/logprob_abs_diff_max"] < ENGINE_AND_LEARNER
    assert second["rollout_corr/logprob_abs_diff_max"] > MOVED  # by then the weights are other ones


def test_an_answer_ends_where_the_model_says_so(life, name):
    """Ends come from the tokenizer and from the generation config, which may list several."""
    ends = ARCHITECTURES[name].ends
    for rollout in (*life.before, *life.after):
        answer = rollout.token_ids_T[rollout.loss_mask_T].tolist()
        assert not ends & set(answer[:-1])
        assert (answer[-1] in ends) == (rollout.stop_reason is StopReason.EOS)
        assert not {"<s>", "</s>", "<turn_end>"} & set(rollout.completion.split())


def test_a_prompt_begins_with_one_first_token_at_most_and_the_template_where_there_is_one(life, name):
    architecture = ARCHITECTURES[name]
    for rollout in life.before:
        prompt = rollout.token_ids_T[: rollout.num_prompt_tokens].tolist()
        assert prompt.count(BOS) == architecture.adds_bos == (prompt[0] == BOS)
        # the user's turn, and the assistant's that is to be written
        assert prompt.count(TURN_START) == (0 if architecture.chat_template is None else 2)


def test_the_saved_folder_is_the_trained_model_for_plain_transformers(life, folders, name):
    saved = folders / f"{name}-saved"
    model, report = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, unexpected, of another shape
    assert model.dtype == torch.float32
    before = AutoModelForCausalLM.from_pretrained(folders / name)
    assert model.config.tie_word_embeddings == before.config.tie_word_embeddings
    head, embedding = (of().weight for of in (model.get_output_embeddings, model.get_input_embeddings))
    assert (head is embedding) == bool(before.config.tie_word_embeddings)
    for one, learner in zip(plain_logprobs(saved, life.after), life.learner_logprobs, strict=True):
        np.testing.assert_allclose(one, learner[1:], atol=1e-5)


def test_the_saved_folder_keeps_config_and_tokenizer(life, folders, name):
    folder, saved = folders / name, folders / f"{name}-saved"
    config, kept = (json.loads((path / "config.json").read_text()) for path in (folder, saved))
    assert kept == {**config, "dtype": "float32"}
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (saved / file).read_bytes() == (folder / file).read_bytes()
    assert AutoTokenizer.from_pretrained(saved).chat_template == ARCHITECTURES[name].chat_template
