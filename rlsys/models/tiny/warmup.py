"""Supervised warm-up of the embedded model on worked answers, up to where a third to a half of its answers are right.

Every answer shown is right, but long ones are at first not shown to their end: of the sums below 100 the whole answer,
of the others (more than half) the two lowest digits. So the model learns to add all digits but the last, and then, from
a few ends, hardly that a sum may have a third digit: it starts with few large sums right, and reinforcement learning
has to find their end. A warm-up on whole answers, broken off at the same accuracy, leaves a model that guesses (its
sampled answers are right half as often as its greedy ones) and that learns far slower.

No question that ``hold_out`` would hold out, up to 2,000, is ever trained on.

Legend: N questions, B batch, T tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from rlsys.config.schema import DataSection, Row
from rlsys.prompts.question import Question
from rlsys.prompts.source import SPLIT_SEED
from rlsys.prompts.split import hold_out
from rlsys.prompts.tasks import make_task

MOST_HELD_OUT = 2000  # so many held-out questions stay untrained; those beyond the default's 500 measure the accuracy

Progress = Callable[[int, float], None]  # called with (step, accuracy): once at the start, then at every check


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The numbers of the warm-up.

    Attributes:
        batch_size: questions a step.
        lr, betas, warmup_steps, max_grad_norm: AdamW without weight decay, linear warm-up of the learning rate.
        settle_at: once this share of the answers is right, the learning rate falls to ``final_lr`` within
            ``settle_steps``: what was learned becomes certain.
        end_shown: share of the longer answers that are shown to their end, once settled; none before.
        stop_at: once settled, this share of right answers ends the warm-up.
        first_check, check_every, max_steps: steps. No model of the default recipe has learned to add before the first
            check.
    """

    batch_size: int = 128
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    warmup_steps: int = 20
    max_grad_norm: float = 1.0
    settle_at: float = 0.40
    settle_steps: int = 50
    final_lr: float = 2e-4
    end_shown: float = 0.05
    stop_at: float = 0.46
    first_check: int = 100
    check_every: int = 5
    max_steps: int = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class Lessons:
    """Worked answers, rendered with the chat template and padded on the right.

    Attributes:
        token_ids_NT: int64.
        answer_mask_NT: bool, the tokens of the answer, its end-of-sequence token included.
        end_mask_NT: bool, those of them that lie beyond the length of the shortest answer; all False where the answer
            is of that length itself.
    """

    token_ids_NT: Tensor
    answer_mask_NT: Tensor
    end_mask_NT: Tensor


def warm_up(
    model: Qwen2ForCausalLM,
    lessons: Lessons,
    exam: Lessons,
    *,
    seed: int,
    recipe: Recipe,
    progress: Progress | None = None,
) -> tuple[int, float]:
    """Train ``model`` in place on ``lessons``, up to where it passes ``exam`` as well as ``recipe`` says. Draws on no
    global random state.

    Returns:
        Steps taken, and the share of greedy answers of the exam that are right.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=recipe.betas, weight_decay=0.0)
    settling_since: int | None = None
    accuracy = 0.0
    if progress is not None:
        progress(0, accuracy)
    for step in range(1, recipe.max_steps + 1):
        settled = settling_since is not None and step > settling_since + recipe.settle_steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, settling_since)
        end_shown = recipe.end_shown if settled else 0.0
        loss = lesson_loss(model, draw_lessons(lessons, recipe.batch_size, end_shown, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        if step < recipe.first_check or step % recipe.check_every:
            continue
        accuracy = greedy_accuracy(model, exam)
        if progress is not None:
            progress(step, accuracy)
        if settling_since is None and accuracy >= recipe.settle_at:
            settling_since = step
        if settled and accuracy >= recipe.stop_at:
            break
    return step, accuracy


def lesson_questions(task: str) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """Questions to train on, and questions that measure: training questions of a run with default settings both, but
    the second are not trained on in the warm-up."""
    questions = make_task(Row(name=task)).questions
    default_held_out = hold_out(questions, DataSection().eval_questions, SPLIT_SEED).held_out
    wide = hold_out(questions, MOST_HELD_OUT, SPLIT_SEED)
    held_out = {question.content for question in default_held_out}
    held_back = [question for question in wide.held_out if question.content not in held_out]
    return wide.train, tuple(held_back[::2])


def render_lessons(tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]) -> Lessons:
    """Token ids as a rollout has them (chat template, then the answer and end of sequence)."""
    conversations_N = [[{"role": "user", "content": question.content}] for question in questions]
    rendered_N = tokenizer.apply_chat_template(conversations_N, add_generation_prompt=True, tokenize=False)
    prompts_N = tokenizer(rendered_N, add_special_tokens=False)["input_ids"]
    written_N = tokenizer([question.answer for question in questions], add_special_tokens=False)["input_ids"]
    answers_N = [[*answer, tokenizer.eos_token_id] for answer in written_N]
    shortest = min(len(answer) for answer in answers_N) - 1  # without the end of sequence
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts_N, answers_N, strict=True))
    token_ids_NT = torch.full((len(questions), longest), tokenizer.pad_token_id)
    answer_mask_NT = torch.zeros(len(questions), longest, dtype=torch.bool)
    end_mask_NT = torch.zeros(len(questions), longest, dtype=torch.bool)
    for n, (prompt, answer) in enumerate(zip(prompts_N, answers_N, strict=True)):
        start, end = len(prompt), len(prompt) + len(answer)
        token_ids_NT[n, :end] = torch.tensor([*prompt, *answer])
        answer_mask_NT[n, start:end] = True
        end_mask_NT[n, start + shortest : end] = len(answer) - 1 > shortest
    return Lessons(token_ids_NT=token_ids_NT, answer_mask_NT=answer_mask_NT, end_mask_NT=end_mask_NT)


def lesson_loss(model: Qwen2ForCausalLM, lessons: Lessons) -> Tensor:
    """Mean cross-entropy of the answer tokens, nats."""
    logits_NTV = model(lessons.token_ids_NT[:, :-1]).logits
    mask_NT = lessons.answer_mask_NT[:, 1:]
    return cross_entropy(logits_NTV[mask_NT], lessons.token_ids_NT[:, 1:][mask_NT])


@torch.no_grad()
def greedy_accuracy(model: Qwen2ForCausalLM, lessons: Lessons) -> float:
    """Share of questions answered rightly at temperature 0.

    One forward over the worked answers tells: greedy decoding writes the answer if and only if each of its tokens is
    the most likely one after the prompt and the answer's tokens before it.
    """
    predicted_NT = model(lessons.token_ids_NT[:, :-1]).logits.argmax(dim=-1)
    right_NT = (predicted_NT == lessons.token_ids_NT[:, 1:]) | ~lessons.answer_mask_NT[:, 1:]
    return right_NT.all(dim=1).float().mean().item()


def learning_rate(recipe: Recipe, step: int, settling_since: int | None) -> float:
    """Linear warm-up, constant, then linear to ``final_lr`` within ``settle_steps``. Steps count from 1."""
    if settling_since is None:
        return recipe.lr * min(1.0, step / recipe.warmup_steps)
    settled = min(1.0, (step - settling_since) / recipe.settle_steps)
    return recipe.lr + (recipe.final_lr - recipe.lr) * settled


def draw_lessons(lessons: Lessons, batch_size: int, end_shown: float, generator: torch.Generator) -> Lessons:
    """A batch of lessons, drawn with replacement; of the longer answers the share ``end_shown`` keeps its end."""
    chosen_B = torch.randint(len(lessons.token_ids_NT), (batch_size,), generator=generator)
    hidden_B = torch.rand(batch_size, generator=generator) >= end_shown
    end_mask_BT = lessons.end_mask_NT[chosen_B]
    return Lessons(
        token_ids_NT=lessons.token_ids_NT[chosen_B],
        answer_mask_NT=lessons.answer_mask_NT[chosen_B] & ~(end_mask_BT & hidden_B[:, None]),
        end_mask_NT=end_mask_BT,
    )
