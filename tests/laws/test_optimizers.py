"""Optimizers beside AdamW, schedules and the spikes of a run, on real ranks; what AdamW does stands in test_layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlsys.algo.advantages import grpo
from rlsys.batch.build import build
from tests.laws.learner_ranks import make_groups, section
from tests.laws.test_gradient import OLDEST_STEP, VERSION, load, packed, reference_step

pytestmark = pytest.mark.engines

STEPS = 4
TORCH = {
    "adam": (torch.optim.Adam, {"lr": 1e-2, "betas": (0.8, 0.9), "weight_decay": 0.1}),
    "adagrad": (torch.optim.Adagrad, {"lr": 1e-2, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 1.0, "momentum": 0.5}),
}


def losses(ranks, model_path: str, world_size: int, zero_stage: int, **keys: Any) -> list[float]:
    samples = build(make_groups(VERSION), advantage=grpo, oldest_step=OLDEST_STEP, correct_at=1.0)
    once = packed(samples, world_size, 64)
    outcomes = ranks.run(
        world_size,
        lambda rank: once(rank) * STEPS,
        model_path=model_path,
        train=section(zero_stage, world_size, **keys),
    )
    return [metrics["actor/pg_loss"] for metrics in outcomes[0].metrics]


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_an_optimizer_is_the_one_of_torch(ranks, model_path, name, zero_stage):
    kind, settings = TORCH[name]
    model = load(model_path)
    optimizer = kind(model.parameters(), **settings)
    wanted = []
    for _ in range(STEPS):
        wanted.append(reference_step(model, make_groups(VERSION))[0])
        optimizer.step()
    keys = {key: value for key, value in settings.items() if key != "momentum"}
    row = {"name": name, **({"momentum": settings["momentum"]} if name == "sgd" else {})}
    got = losses(ranks, model_path, 2, zero_stage, optimizer=row, **keys)
    assert got == pytest.approx(wanted, abs=1e-4)
    assert abs(wanted[-1] - wanted[0]) > 1e-2


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_muon_is_the_same_in_every_layout_but_for_its_rounding(ranks, model_path, zero_stage):
    """It makes matrices orthogonal in 16 bits."""
    keys = {"optimizer": {"name": "muon", "adam_lr": 1e-3}, "lr": 1e-2, "weight_decay": 0.1}
    wanted, got = losses(ranks, model_path, 1, 0, **keys), losses(ranks, model_path, 2, zero_stage, **keys)
    assert got == pytest.approx(wanted, abs=1e-3)
    assert abs(wanted[-1] - wanted[0]) > 1e-2
