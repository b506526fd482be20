"""Optimizers beside AdamW, schedules and the spikes of a run, on real ranks; what AdamW does stands in test_layouts."""

from __future__ import annotations

import multiprocessing as mp
from typing import Any

import pytest
import torch

from rlsys.algo.advantages import grpo
from rlsys.batch.build import build
from rlsys.train import parallel
from rlsys.train.checkpoint import Layout
from rlsys.train.schedule import LearningRate
from rlsys.train.trained import Trained
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


class HalfUsed(torch.nn.Module):
    """One of its weights reaches nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return (self.used * value).sum()


def decay_alone(pipe: Any) -> None:
    deepspeed = parallel.load_deepspeed("cpu")
    any_port = 0
    parallel.join(
        deepspeed, device="cpu", rank=0, world_size=1, master_addr="127.0.0.1", master_port=any_port, timeout_s=60.0
    )
    train = section(0, 1, lr=0.1, optimizer={"name": "adamw"}, weight_decay=0.5, max_grad_norm=0.0)
    layout = Layout.of(train, world_size=1)
    trained = Trained(HalfUsed(), train, LearningRate(), deepspeed=deepspeed, device="cpu", rank=0, layout=layout)
    trained.backward(trained(value=torch.ones(3)), 1.0, is_last=True)
    trained.step(VERSION)
    pipe.send(trained.module.unused.tolist())


def test_weights_that_nothing_reached_decay_on_a_rank_alone_as_well():
    here, there = mp.get_context("spawn").Pipe()
    process = mp.get_context("spawn").Process(target=decay_alone, args=(there,))
    process.start()
    there.close()
    assert here.poll(120.0)
    assert here.recv() == pytest.approx([0.95] * 3)  # 1 - lr x weight decay
    process.join(60.0)
