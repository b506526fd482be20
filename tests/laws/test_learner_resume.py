"""A learner that was saved goes on in other processes as if it had never stopped, bit for bit."""

from __future__ import annotations

import itertools
import multiprocessing as mp
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlsys.algo.advantages import grpo
from rlsys.algo.corrections import tis
from rlsys.algo.losses import ppo_clip
from rlsys.batch.build import build
from rlsys.batch.pack import pack
from rlsys.batch.tensors import Batch
from rlsys.config.schema import TrainSection
from rlsys.errors import CheckpointDamaged, ConfigError
from rlsys.records import Version
from rlsys.train.base import check_base
from rlsys.train.checkpoint import Layout, saved_layout
from rlsys.train.learner import LearnerRank
from rlsys.train.objective import Divergence, Objective
from rlsys.train.resume import check_layout
from rlsys.weights.tcp import free_port
from tests.laws.layouts import make_folder
from tests.laws.learner_ranks import DEADLINE_S, TEMPERATURE, is_time, make_groups, make_model, section, take_copies

pytestmark = pytest.mark.engines

WARMUP_STEPS, LR = 8, 1e-2
BFLOAT16 = {"dtype": "bfloat16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Life:
    """What a rank saw: metrics per batch (times left out), random numbers drawn at the checkpoint, final weights (rank
    0 only)."""

    metrics: list[dict[str, float]]
    drawn: list[float]
    weights: dict[str, np.ndarray]


def live(
    rank: int,
    world_size: int,
    port: int,
    model_path: str,
    train: TrainSection,
    batches: Sequence[Batch],
    *,
    checkpoint: str | None = None,
    run_batches: int = 1,
    save_after: int = -1,
    save_to: str = "",
    max_file_bytes: Mapping[int, int] | None = None,
    kl: Divergence | None = None,
) -> Life:
    """One rank from start to stop; it draws random numbers at the checkpoint.

    Args:
        run_batches: of the whole run.
        save_after: so many batches.
        max_file_bytes: by rank, how long its files may become in a first attempt to save, which has to fail there.
    """
    learner = LearnerRank(
        model_path=model_path,
        train=train,
        temperature=TEMPERATURE,
        objective=Objective(loss=ppo_clip, correction=partial(tis, cap=2.0), kl=kl),
        batches=run_batches,
        seed=11 + rank,
        threads=1,
    )
    metrics: list[dict[str, float]] = []
    drawn: list[float] = []
    weights: dict[str, np.ndarray] = {}
    try:
        learner.start(rank, world_size, "127.0.0.1", port, checkpoint=checkpoint)
        if checkpoint is not None:
            drawn = torch.rand(3).tolist()
        for index, batch in enumerate(batches):
            if index == save_after:
                if max_file_bytes is not None:
                    fail_to_save(learner, save_to, max_file_bytes.get(rank))
                learner.save_checkpoint(save_to)
                drawn = torch.rand(3).tolist()
            metrics.append(learner.step(batch.for_rank(rank * train.ranks // train.processes)))  # while it is written
        if save_after >= 0:
            written = learner.checkpoint_written(DEADLINE_S)
            assert written is not None and written.failure == ""
        learner.export(partial(take_copies, weights))
    finally:
        learner.stop()
    return Life(
        metrics=[{name: value for name, value in own.items() if not is_time(name)} for own in metrics],
        drawn=drawn,
        weights=weights,
    )


def fail_to_save(learner: Any, folder: str, max_bytes: int | None) -> None:
    """A full disk: files of this process cannot grow beyond ``max_bytes``, where that is given."""
    limit = resource.RLIM_INFINITY if max_bytes is None else max_bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        learner.save_checkpoint(folder)
        written = learner.checkpoint_written(DEADLINE_S)
        assert ("File too large" in written.failure) == (max_bytes is not None), written
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


Lives = Callable[..., list[Life]]


@pytest.fixture(scope="module")
def processes() -> Iterator[Any]:
    """A pool of two, each process of which ends with its task.

    They are forked from one that has imported everything: DeepSpeed's counters and patches of torch are those of a new
    process, without the seconds of its imports.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__, "deepspeed"])
    with context.Pool(2, maxtasksperchild=1) as pool:
        yield pool


@pytest.fixture(scope="module")
def lives(processes) -> Lives:
    """``live`` on so many ranks at once, each in a process of its own."""

    def run(world_size: int, *arguments: Any, **keys: Any) -> list[Life]:
        port = free_port("127.0.0.1")
        ranks = [(rank, world_size, port, *arguments) for rank in range(world_size)]
        answers = [processes.apply_async(live, rank, keys) for rank in ranks]
        return [answer.get(timeout=DEADLINE_S) for answer in answers]

    return run


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


def six_batches(world_size: int, steps_per_batch: int) -> list[Batch]:
    """Every pair of four groups; tokens of two versions."""
    batches = []
    for step, pair in enumerate(itertools.combinations(range(4), 2)):
        version = Version(incarnation=0, step=7 + step)
        groups = make_groups(version)
        batches.append(
            pack(
                build([groups[index] for index in pair], advantage=grpo, oldest_step=version.step - 1, correct_at=1.0),
                ranks=world_size,
                steps_per_batch=steps_per_batch,
                tokens_per_microbatch=64,
                pad_token_id=3,
                version=version,
            )
        )
    return batches


def adamw(zero_stage: int, ranks: int, **keys: Any) -> TrainSection:
    return section(
        zero_stage,
        ranks,
        lr=LR,
        max_grad_norm=1.0,
        warmup_steps=WARMUP_STEPS,
        timeout_s=120.0,
        optimizer={"name": "adamw"},
        weight_decay=0.1,
        **keys,
    )


@pytest.mark.parametrize(
    ("ranks", "zero_stage", "steps_per_batch", "keys"),
    [
        (1, 0, 2, {}),
        (1, 1, 2, {}),
        (1, 2, 1, {}),
        (1, 3, 2, {}),
        (2, 0, 1, {}),
        (2, 2, 2, {}),
        (2, 3, 2, {}),
        (1, 0, 2, BFLOAT16),
        (2, 2, 1, BFLOAT16),
        (2, 2, 1, {"offload": "optimizer"}),
        (2, 3, 2, {"offload": "optimizer+params", **BFLOAT16}),
    ],
)
def test_a_learner_goes_on_from_its_checkpoint_bit_for_bit(
    lives, model_path, tmp_path, ranks, zero_stage, steps_per_batch, keys
):
    train = adamw(zero_stage, ranks, **keys)
    batches = six_batches(ranks, steps_per_batch)
    folder = tmp_path / "learner"
    whole = lives(ranks, model_path, train, batches, save_after=3, save_to=str(folder))
    resumed = lives(ranks, model_path, train, batches[3:], checkpoint=str(folder))
    for rank in range(ranks):
        assert resumed[rank].metrics == whole[rank].metrics[3:]
        assert resumed[rank].drawn == whole[rank].drawn
    assert whole[0].weights.keys() == resumed[0].weights.keys()
    for name, weight in whole[0].weights.items():
        assert np.array_equal(resumed[0].weights[name], weight), name
    # the metric is the rate of a batch's last optimizer step; the warm-up ends in the fourth batch of two steps
    done = [(index + 1) * steps_per_batch for index in range(6)]
    assert [own["actor/lr"] for own in whole[0].metrics] == [LR * min(1.0, step / WARMUP_STEPS) for step in done]
    assert ranks == 1 or whole[0].drawn != whole[1].drawn


def test_a_run_that_is_made_longer_goes_on_in_the_stable_phase_and_warms_up_again_where_asked(
    lives, model_path, tmp_path
):
    keys = {"schedule": {"name": "wsd", "decay_share": 0.5}, "rewarm_steps": 4}
    train = adamw(2, 1, **keys).model_copy(update={"warmup_steps": 0})
    batches, folder = six_batches(1, 1), str(tmp_path)
    (short,) = lives(1, model_path, train, batches[:4], run_batches=4, save_after=3, save_to=folder)
    (longer,) = lives(1, model_path, train, batches[3:], run_batches=60, checkpoint=folder)
    assert [own["actor/lr"] for own in short.metrics] == [LR, LR, LR, LR / 2]
    assert [own["actor/lr"] for own in longer.metrics] == [LR / 4, LR / 2, LR * 3 / 4]


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_learner_whose_layers_are_cut_goes_on_bit_for_bit(lives, model_path, tmp_path, zero_stage):
    train = adamw(zero_stage, 1).model_copy(update={"tensor_parallel": 2})
    batches, folder = six_batches(1, 2)[:4], str(tmp_path / "learner")
    whole = lives(2, model_path, train, batches, save_after=2, save_to=folder)
    resumed = lives(2, model_path, train, batches[2:], checkpoint=folder)
    for mine, theirs in zip(resumed, whole, strict=True):
        assert mine.metrics == theirs.metrics[2:] and mine.drawn == theirs.drawn
    for name, weight in whole[0].weights.items():
        assert np.array_equal(resumed[0].weights[name], weight), name


@pytest.mark.parametrize(("key", "ranks", "zero_stage"), [("expert", 2, 0), ("expert", 2, 2), ("sequence", 1, 3)])
def test_a_learner_whose_experts_or_rows_are_shared_out_goes_on_bit_for_bit(lives, tmp_path, key, ranks, zero_stage):
    train = adamw(zero_stage, ranks).model_copy(update={f"{key}_parallel": 2, "router_aux_coef": 0.5})
    batches, folder, path = six_batches(ranks, 2)[:4], str(tmp_path / "learner"), make_folder("Mixtral", tmp_path)
    whole = lives(2, path, train, batches, save_after=2, save_to=folder)
    resumed = lives(2, path, train, batches[2:], checkpoint=folder)
    for mine, theirs in zip(resumed, whole, strict=True):
        assert mine.metrics == theirs.metrics[2:] and mine.drawn == theirs.drawn
    for name, weight in whole[0].weights.items():
        assert np.array_equal(resumed[0].weights[name], weight), name
    with pytest.raises(ConfigError, match="shared out"):
        check_layout(folder, adamw(zero_stage, ranks), moves_reference=False)


@pytest.mark.parametrize(
    ("zero_stage", "ranks", "keys"),
    [
        (0, 1, {"lora": {"r": 2}}),
        (2, 2, {"lora": {"r": 2}}),
        (3, 2, {"lora": {"r": 2}}),
        (0, 1, {"frozen": ["lm_head*", "model.layers.0.*"]}),
        (3, 2, {"frozen": ["lm_head*", "model.layers.0.*"]}),
    ],
)
def test_what_is_not_trained_is_left_out_of_the_checkpoint_and_the_run_goes_on_bit_for_bit(
    lives, model_path, tmp_path, zero_stage, ranks, keys
):
    """The head is tied to the embedding: neither of its names is saved."""
    train = adamw(zero_stage, ranks).model_copy(update=keys)
    batches, folder = six_batches(ranks, 1)[:4], tmp_path / "learner"
    whole = lives(ranks, model_path, train, batches, save_after=2, save_to=str(folder))
    (model_states, *_) = sorted((folder / "deepspeed").glob("*model_states.pt"))
    saved = torch.load(model_states, weights_only=False)
    assert saved["module"] and saved.get("frozen_param_fragments") is None
    for name in saved["module"]:
        assert "lora_" in name if "lora" in keys else "embed" not in name and "head" not in name and ".0." not in name
    weights_bytes = (Path(model_path) / "model.safetensors").stat().st_size
    total = sum(path.stat().st_size for path in folder.rglob("*"))
    assert total < (0.6 if "lora" in keys else 4.3 * 0.6) * weights_bytes  # of what is trained: 5%, or 44%
    resumed = lives(ranks, model_path, train, batches[2:], checkpoint=str(folder))
    for mine, theirs in zip(resumed, whole, strict=True):
        assert mine.metrics == theirs.metrics[2:] and mine.drawn == theirs.drawn
    for name, weight in whole[0].weights.items():
        assert np.array_equal(resumed[0].weights[name], weight), name


def test_another_model_below_a_checkpoint_is_refused_before_the_ranks_meet(lives, model_path, tmp_path):
    train, folder = adamw(2, 1).model_copy(update={"lora": {"r": 2}}), str(tmp_path / "learner")
    lives(1, model_path, train, six_batches(1, 1)[:1], save_after=0, save_to=folder)
    same, other = str(tmp_path / "same"), str(tmp_path / "other")
    shutil.copytree(model_path, same)
    shutil.copytree(model_path, other)
    weights = load_file(f"{other}/model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, f"{other}/model.safetensors")
    check_base(folder, same)
    with pytest.raises(ConfigError) as caught:
        lives(1, other, train, [], checkpoint=folder)
    assert caught.value.what == "model.path" and "model.safetensors is another" in caught.value.got


def test_a_checkpoint_is_the_state_and_nothing_else(lives, model_path, tmp_path):
    folder = tmp_path / "nested" / "learner"
    lives(2, model_path, adamw(2, 2), six_batches(2, 1)[:2], save_after=1, save_to=str(folder))
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert files == [
        "nested/learner/deepspeed/mp_rank_00_model_states.pt",
        "nested/learner/deepspeed/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "nested/learner/deepspeed/zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "nested/learner/layout.json",
        "nested/learner/model.json",
        "nested/learner/rank_0.pt",
        "nested/learner/rank_1.pt",
    ]
    weights_bytes = (Path(model_path) / "model.safetensors").stat().st_size
    total = sum(path.stat().st_size for path in tmp_path.rglob("*"))
    assert total < 4.3 * weights_bytes  # the weights, ZeRO's float32 copy of them, and two moments


@pytest.mark.parametrize(("max_bytes", "zero_stage"), [(1000, 2), (100_000, 3)])  # of its own files, or of DeepSpeed's
def test_a_rank_that_cannot_write_says_so_and_all_go_on(lives, model_path, tmp_path, max_bytes, zero_stage):
    train, batches = adamw(zero_stage, 2), six_batches(2, 1)[:3]
    folder = str(tmp_path / "learner")
    limits = {1: max_bytes}
    whole = lives(2, model_path, train, batches, save_after=1, save_to=folder, max_file_bytes=limits)
    resumed = lives(2, model_path, train, batches[1:], checkpoint=folder)
    assert resumed[1].metrics == whole[1].metrics[1:]


def test_a_learner_of_another_layout_is_refused_before_the_ranks_meet(lives, model_path, tmp_path):
    folder = str(tmp_path)
    lives(1, model_path, adamw(2, 1), six_batches(1, 1)[:1], save_after=0, save_to=folder)
    assert saved_layout(folder) == Layout(ranks=1, zero_stage=2)
    with pytest.raises(ConfigError) as caught:
        lives(1, model_path, adamw(1, 1), [], checkpoint=folder)
    assert caught.value.what == "the layout of the learner"


def test_a_folder_without_a_learner_is_refused(lives, model_path, tmp_path):
    with pytest.raises(CheckpointDamaged, match="layout.json"):
        lives(1, model_path, adamw(0, 1), [], checkpoint=str(tmp_path))


def test_the_layout_is_read_without_heavy_libraries():
    code = "import sys, rlsys.train.checkpoint; print([name for name in ('torch', 'deepspeed') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
