"""The embedded model: what it is, what its warm-up may see, and that it is the same every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsys.config.schema import DataSection, Row
from rlsys.errors import RlsysError
from rlsys.models.tiny import make, make_tiny, tiny_model_path
from rlsys.models.tiny.model import make_random_model, make_tokenizer
from rlsys.models.tiny.warmup import (
    Recipe,
    draw_lessons,
    greedy_accuracy,
    learning_rate,
    lesson_questions,
    render_lessons,
    warm_up,
)
from rlsys.prompts.question import Question, question_key
from rlsys.prompts.source import load_questions
from rlsys.rollout.play import opening_tokens

FEW_STEPS = Recipe(batch_size=8, first_check=2, check_every=2, max_steps=4)


def decoded(tokenizer: Any, token_ids: list[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=False)


def test_the_folder_loads_in_plain_transformers_with_the_weights_that_were_made(tmp_path: Path) -> None:
    summary = make_tiny(tmp_path, seed=3, warm_up=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert summary.num_parameters == sum(parameter.numel() for parameter in model.parameters()) == 804_992
    assert (summary.steps, summary.accuracy, summary.path) == (0, None, tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == len(tokenizer) == 128
    assert model.config.max_position_embeddings >= 1024
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = make_random_model(make_tokenizer())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_every_printable_character_is_one_token_and_comes_back() -> None:
    tokenizer = make_tokenizer()
    text = "".join(map(chr, range(32, 127))) + "\n a  b"
    token_ids = tokenizer(text)["input_ids"]
    assert len(token_ids) == len(text)
    assert tokenizer.decode(token_ids) == text
    assert tokenizer.unk_token_id not in token_ids
    assert tokenizer("\u00e9")["input_ids"] == [tokenizer.unk_token_id]
    assert tokenizer.decode(tokenizer("<user>64<eos><pad>")["input_ids"], skip_special_tokens=True) == "64"


def test_a_lesson_is_the_prompt_of_a_rollout_then_the_answer_and_its_end(tmp_path: Path) -> None:
    make_tiny(tmp_path, warm_up=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    lessons = render_lessons(
        tokenizer, [Question(content="21+43=", answer="64"), Question(content="99+99=", answer="891")]
    )
    short, long = lessons.token_ids_NT
    prompt = opening_tokens(tokenizer, "21+43=")
    assert short[: len(prompt)].tolist() == prompt
    assert decoded(tokenizer, prompt) == "<user>21+43=<assistant>"
    assert decoded(tokenizer, short.tolist()) == "<user>21+43=<assistant>64<eos><pad>"
    assert decoded(tokenizer, short[lessons.answer_mask_NT[0]].tolist()) == "64<eos>"
    assert decoded(tokenizer, long[lessons.answer_mask_NT[1]].tolist()) == "891<eos>"
    assert decoded(tokenizer, long[lessons.end_mask_NT[1]].tolist()) == "1<eos>"
    assert not lessons.end_mask_NT[0].any()


def test_the_loss_sees_the_ends_of_longer_answers_only_as_often_as_asked() -> None:
    tokenizer = make_tokenizer()
    lessons = render_lessons(
        tokenizer, [Question(content="21+43=", answer="64"), Question(content="99+99=", answer="891")]
    )

    def answer_tokens_in_the_loss(end_shown: float) -> set[tuple[str, str]]:
        drawn = draw_lessons(lessons, 64, end_shown, torch.Generator().manual_seed(0))
        return {
            (decoded(tokenizer, token_ids[1:3].tolist()), decoded(tokenizer, token_ids[mask].tolist()))
            for token_ids, mask in zip(drawn.token_ids_NT, drawn.answer_mask_NT, strict=True)
        }

    assert answer_tokens_in_the_loss(0.0) == {("21", "64<eos>"), ("99", "89")}
    assert answer_tokens_in_the_loss(1.0) == {("21", "64<eos>"), ("99", "891<eos>")}
    assert answer_tokens_in_the_loss(0.5) == {("21", "64<eos>"), ("99", "89"), ("99", "891<eos>")}


def test_accuracy_by_one_forward_equals_that_of_greedy_decoding() -> None:
    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make_random_model(tokenizer).eval()
    prompt = torch.tensor([opening_tokens(tokenizer, "21+43=")])
    sampled = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=3)
    answer = decoded(tokenizer, sampled[0, prompt.shape[1] :].tolist())
    model_ends = tokenizer.eos_token_id in sampled[0]
    lessons = render_lessons(tokenizer, [Question(content="21+43=", answer=answer)])
    unended = lessons.answer_mask_NT & (lessons.token_ids_NT != tokenizer.eos_token_id)
    assert not model_ends
    assert greedy_accuracy(model, lessons) == 0.0  # it does not end its answer
    lessons.answer_mask_NT.copy_(unended)
    assert greedy_accuracy(model, lessons) == 1.0
    lessons.token_ids_NT[0, prompt.shape[1] + 1] += 1
    assert greedy_accuracy(model, lessons) == 0.0


def test_the_warm_up_never_sees_a_question_that_a_run_holds_out() -> None:
    trained, measured = lesson_questions("reversed_sum")
    trained_keys = {question_key(question.content) for question in trained}
    assert len(trained) == 6100 and len(measured) == 750
    assert not trained_keys & {question_key(question.content) for question in measured}
    for eval_questions in (100, 500, 2000):
        data = DataSection(task=Row(name="reversed_sum"), eval_questions=eval_questions)
        held_out = {question_key(question.content) for question in load_questions(data).split.held_out}
        assert not trained_keys & held_out
        if eval_questions <= 500:
            assert not held_out & {question_key(question.content) for question in measured}


def test_the_same_seed_trains_the_same_weights_and_another_seed_others() -> None:
    tokenizer = make_tokenizer()
    lessons, exam = (render_lessons(tokenizer, questions[:50]) for questions in lesson_questions("reversed_sum"))

    def trained(seed: int) -> torch.Tensor:
        with make._one_seeded_thread(seed):
            model = make_random_model(tokenizer)
            warm_up(model, lessons, exam, seed=seed, recipe=FEW_STEPS)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    first = trained(0)
    assert torch.equal(first, trained(0))
    assert not torch.equal(first, trained(1))


def test_a_warm_up_that_misses_the_band_is_an_error_and_tells_its_accuracies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = tuple(questions[:50] for questions in lesson_questions("reversed_sum"))
    monkeypatch.setattr(make, "lesson_questions", lambda task: few)
    told: list[tuple[int, float]] = []
    with pytest.raises(RlsysError, match=r"0\.00, 0\.00, 0\.00 of the answers right"):
        make_tiny(tmp_path / "m", recipe=FEW_STEPS, progress=lambda step, accuracy: told.append((step, accuracy)))
    assert told == [(0, 0.0), (2, 0.0), (4, 0.0)] * 3
    assert not (tmp_path / "m").exists()


def test_making_a_model_leaves_torch_as_it_was_and_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    threads_before, rng_before = torch.get_num_threads(), torch.get_rng_state()
    make_tiny(tmp_path, seed=5, warm_up=False)
    assert torch.get_num_threads() == threads_before
    assert torch.equal(torch.get_rng_state(), rng_before)
    assert capfd.readouterr() == ("", "")


def test_the_learning_rate_rises_stays_and_settles_to_the_final_one() -> None:
    recipe = Recipe(lr=1.0, warmup_steps=4, settle_steps=10, final_lr=0.5)
    assert [learning_rate(recipe, step, None) for step in (1, 2, 4, 50)] == [0.25, 0.5, 1.0, 1.0]
    assert [learning_rate(recipe, 50 + step, 50) for step in (5, 10, 11)] == [0.75, 0.5, 0.5]


def test_the_cached_model_is_made_once_and_appears_only_when_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def make_quickly(out: Path, *, seed: int, progress: object) -> None:
        assert not [folder for folder in tmp_path.iterdir() if not folder.name.startswith(".")]
        made.append(out)
        make_tiny(out, seed=seed, warm_up=False)

    monkeypatch.setattr(make, "make_tiny", make_quickly)
    folder = tiny_model_path(tmp_path, seed=1)
    assert tiny_model_path(tmp_path, seed=1) == folder and len(made) == 1
    assert sorted(tmp_path.iterdir()) == [folder]
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 128
    assert make.recipe_hash(1) in folder.name and make.recipe_hash(1) != make.recipe_hash(2)


def test_of_two_processes_that_make_the_model_at_once_the_slower_takes_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_too_late(out: Path, *, seed: int, progress: object) -> None:
        make_tiny(out, seed=seed, warm_up=False)
        rival = tmp_path / f"tiny-{make.recipe_hash(seed)}"
        make_tiny(rival, seed=seed, warm_up=False)
        (rival / "by_rival").touch()

    monkeypatch.setattr(make, "make_tiny", make_too_late)
    folder = tiny_model_path(tmp_path)
    assert (folder / "by_rival").exists()
    assert list(tmp_path.iterdir()) == [folder]
