"""Frozen weights stay as they are to the last bit, and the others learn as if nothing were frozen."""

from __future__ import annotations

import numpy as np
import pytest

from rlsys.algo import ADVANTAGES
from rlsys.batch.build import build
from rlsys.batch.pack import pack
from rlsys.records import Version
from tests.laws.learner_ranks import Outcome, Ranks, make_groups, section

VERSION = Version(incarnation=0, step=7)
FROZEN = ["lm_head*", "model.layers.0.*", "*norm*"]  # the head is tied: the embedding with it
EXACT = 1e-5  # of the gradient's length; float32

pytestmark = pytest.mark.engines


def trained(ranks: Ranks, model_path: str, layout: tuple[int, int, int], batches: int, **keys) -> Outcome:
    """Rank 0's outcome. ``layout``: data-parallel ranks, ZeRO stage, processes of tensor parallel."""
    num_ranks, zero_stage, parts = layout
    samples = build(make_groups(VERSION), advantage=ADVANTAGES["grpo"], oldest_step=None, correct_at=1.0)
    batch = pack(samples, ranks=num_ranks, steps_per_batch=1, tokens_per_microbatch=96, pad_token_id=3, version=VERSION)
    train = section(zero_stage, num_ranks, tensor_parallel=parts, **keys)
    outcomes = ranks.run(
        num_ranks * parts, lambda rank: [batch.for_rank(rank)] * batches, model_path=model_path, train=train
    )
    assert outcomes[0].diverged is None
    return outcomes[0]


def is_frozen(name: str) -> bool:
    return "embed_tokens" in name or "layers.0." in name or "norm" in name


def change(outcome: Outcome) -> dict[str, np.ndarray]:
    return {name: after.astype(float) - outcome.before[name] for name, after in outcome.after.items()}


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """|one - other| / |other| over all tensors of the first."""
    squares = [(np.square(one[name] - other[name]).sum(), np.square(other[name]).sum()) for name in one]
    return float((sum(gap for gap, _ in squares) / sum(length for _, length in squares)) ** 0.5)


@pytest.fixture(scope="module")
def frozen_alone(ranks, model_path) -> Outcome:
    """Two steps in one process."""
    return trained(ranks, model_path, (1, 0, 1), batches=2, frozen=FROZEN)


def test_a_step_of_the_others_is_that_without_frozen_weights(ranks, model_path):
    """Plain gradient descent: its gradient does not depend on what else is trained."""
    free = trained(ranks, model_path, (1, 0, 1), batches=1)
    once = trained(ranks, model_path, (1, 0, 1), batches=1, frozen=FROZEN)
    learnt = {name: moved for name, moved in change(once).items() if not is_frozen(name)}
    assert 0 < len(learnt) < len(once.before)
    assert distance(learnt, change(free)) <= EXACT


@pytest.mark.parametrize("layout", [(2, 0, 1), (2, 2, 1), (2, 3, 1), (1, 0, 2)])
def test_frozen_weights_stay_to_the_bit_in_any_layout_and_the_others_learn_the_same(
    ranks, model_path, frozen_alone, layout
):
    outcome = trained(ranks, model_path, layout, batches=2, frozen=FROZEN)
    for name, moved in change(outcome).items():
        assert np.any(moved != 0.0) != is_frozen(name), name
    assert distance(change(outcome), change(frozen_alone)) <= 10 * EXACT  # the second step begins where the first led
