"""Law 4: a step is the same in every layout, on many kinds of models."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import docs.layouts
from rlsys.algo.advantages import grpo
from rlsys.algo.catalogue import NOTHING
from rlsys.batch.build import build
from rlsys.plan.tensor_parallel import STYLES
from rlsys.train.compiled_ops import load_op
from tests.laws.layouts import ADAM_LAYOUTS, LAYOUTS, MODELS, Layout, Steps, can_run
from tests.laws.learner_ranks import Ranks, is_of_layout, make_groups, section
from tests.laws.test_gradient import (
    EXACT,
    KINDS_OF_ROWS,
    OLDEST_STEP,
    VERSION,
    gradient_of,
    packed,
    reference_logprobs,
    relative_difference,
)

pytestmark = pytest.mark.engines

CLOSE = 1e-4  # of a loss, nats

# Every layout on every fourth model, and every model in every fourth layout; ``python -m docs.layouts`` takes them all.
CASES = [
    (layout, model)
    for row, layout in enumerate(LAYOUTS)
    for column, model in enumerate(MODELS)
    if (row + column) % 4 == 0 and can_run(MODELS[model], LAYOUTS[layout])
]


@pytest.fixture(scope="module")
def steps(ranks, tmp_path_factory) -> Iterator[Steps]:
    load_op("CPUAdamBuilder", device="cpu", deadline_s=600.0)  # where it was never built: longer than ranks answer in
    four = Ranks(4)
    yield Steps(ranks, four, tmp_path_factory.mktemp("models"))
    four.stop()


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_a_step_is_the_same_in_every_layout(steps, layout, model):
    difference = steps.difference(model, LAYOUTS[layout])
    assert difference.loss <= EXACT and difference.norm <= EXACT and difference.gradient <= EXACT, difference


@pytest.mark.parametrize("layout", ADAM_LAYOUTS)
def test_twenty_steps_of_adam_have_the_losses_of_one_process_in_every_layout(steps, layout):
    assert steps.adam_gap(LAYOUTS[layout]) <= CLOSE
    losses = steps.adam_losses()
    assert abs(losses[10] - losses[0]) > 100 * CLOSE  # the same batch: it was learnt from


def test_the_table_of_layouts_has_their_rows_and_columns_and_keeps_the_law():
    head, *rows = docs.layouts.read_table()
    assert head == ["layout", *MODELS, docs.layouts.ADAM_COLUMN]
    assert [name for name, *_ in rows] == list(LAYOUTS)
    for name, *cells, adam in rows:
        assert (adam != NOTHING) == (name in ADAM_LAYOUTS)
        assert adam == NOTHING or 0.0 < float(adam) <= CLOSE
        for model, cell in zip(MODELS.values(), cells, strict=True):
            assert (cell != NOTHING) == can_run(model, LAYOUTS[name])
            assert cell == NOTHING or 0.0 < float(cell) <= EXACT


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_process_without_attention_heads_changes_nothing(steps, zero_stage):
    """One key-value head, two processes."""
    layout = Layout(tensor_parallel=2, zero_stage=zero_stage)
    assert steps.difference("Gemma, one key-value head", layout).worst <= EXACT


@pytest.mark.parametrize(
    ("kind", "shared"),
    [("batch loss", "tensor"), ("rejection", "tensor"), ("prompts", "tensor"), ("batch loss", "sequence")],
)
def test_what_looks_at_the_whole_batch_sees_each_rank_once(steps, model_path, kind, shared):
    """Two ranks of two processes each, against one process: counts, statistics and metrics over ranks."""
    samples = build(make_groups(VERSION), advantage=grpo, oldest_step=OLDEST_STEP, correct_at=1.0)
    one, four = (
        processes.run(
            num_ranks * parts,
            packed(samples, num_ranks, 64, steps=2),
            model_path=model_path,
            train=section(zero_stage, num_ranks, lr=1.0, **{f"{shared}_parallel": parts}, steps_per_batch=2),
            objective=KINDS_OF_ROWS[kind],
        )
        for processes, num_ranks, parts, zero_stage in ((steps.pair, 1, 1, 0), (steps.four, 2, 2, 2))
    )
    assert relative_difference(gradient_of(four[0], lr=1.0), gradient_of(one[0], lr=1.0)) <= 10 * EXACT
    (wanted,) = one[0].metrics
    for outcome in four:
        (metrics,) = outcome.metrics
        assert metrics.keys() == wanted.keys()
        for name in metrics.keys() - {name for name in metrics if is_of_layout(name)}:
            assert metrics[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(
    ("model", "zero_stage", "shared"),
    [("Llama", 1, "tensor"), ("Qwen2 tied", 3, "tensor"), ("Gemma 2", 2, "tensor"), ("Qwen3", 2, "sequence")],
)
def test_what_leaves_a_cut_model_is_the_whole_one(ranks, steps, tmp_path, model, zero_stage, shared):
    samples = build(make_groups(VERSION), advantage=grpo, oldest_step=OLDEST_STEP, correct_at=1.0)
    once = packed(samples, 1, 64)
    outcomes = ranks.run(
        2,
        lambda rank: once(rank) * 2,
        model_path=steps.path(model),
        train=section(zero_stage, 1, lr=0.25, **{f"{shared}_parallel": 2}),
        probe=[samples[0].token_ids_T],
        save_to=str(tmp_path),
    )
    initial, saved = (
        AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")  # caps attention where the model does
        for path in (steps.path(model), tmp_path)
    )
    assert "rlsys" not in (tmp_path / "config.json").read_text()  # nor how it was trained
    assert not outcomes[1].after  # the second process takes part, and has nothing to write
    for name, parameter in initial.named_parameters():
        assert np.array_equal(outcomes[0].before[name], parameter.detach().numpy())
    for name, parameter in saved.named_parameters():
        assert np.array_equal(outcomes[0].after[name], parameter.detach().numpy())
        assert not np.array_equal(outcomes[0].after[name], outcomes[0].before[name])
    with torch.no_grad():
        wanted = reference_logprobs(saved, torch.tensor(samples[0].token_ids_T).long(), 1.0).numpy()
    for outcome in outcomes:
        np.testing.assert_allclose(outcome.probe[0][1:], wanted, atol=2e-5)


def test_the_ways_of_cutting_are_those_of_deepspeed():
    from deepspeed.module_inject.tp_plan_converter import SUPPORTED_STYLES

    assert STYLES == SUPPORTED_STYLES
