"""A learner that was saved goes on under another layout as if it had always been there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rlsys.algo import KL_ESTIMATORS
from rlsys.errors import CheckpointDamaged, WaitTimeout
from rlsys.train.objective import Divergence
from rlsys.train.resume import convert
from rlsys.train.terms import Term
from rlsys.train.universal import to_universal
from tests.laws.test_learner_resume import BFLOAT16, LR, Life, adamw, lives, model_path, processes, six_batches  # noqa: F401

pytestmark = pytest.mark.engines

CONVERSION_S = 120.0
Spread = tuple[int, int, int]  # data-parallel ranks, tensor parallel, ZeRO stage
Saved = Callable[[Spread], tuple[list[Life], Path]]


def section_of(spread: Spread, **deepspeed):
    ranks, tensor_parallel, zero_stage = spread
    return adamw(zero_stage, ranks, **deepspeed).model_copy(update={"tensor_parallel": tensor_parallel})


@pytest.fixture(scope="module")
def converted(processes) -> Callable[[Path], Path]:  # noqa: F811
    """Converts a learner, without the seconds of imports in a process of its own. Returns the folder."""

    def convert_there(folder: Path) -> Path:
        out = folder.with_name("converted")
        processes.apply_async(to_universal, (folder, out, 1)).get(timeout=CONVERSION_S)
        return out

    return convert_there


@pytest.fixture(scope="module")
def saved(lives, converted, model_path, tmp_path_factory) -> Saved:  # noqa: F811
    """A life of six batches under a layout, and the checkpoint after three of them, converted. Each made once."""
    made: dict[Spread, tuple[list[Life], Path]] = {}

    def life(spread: Spread) -> tuple[list[Life], Path]:
        if spread not in made:
            folder = tmp_path_factory.mktemp("saved")
            ranks, tensor_parallel, _ = spread
            whole = lives(
                ranks * tensor_parallel,
                model_path,
                section_of(spread),
                six_batches(ranks, 1),
                save_after=3,
                save_to=str(folder / "learner"),
            )
            made[spread] = whole, converted(folder / "learner")
        return made[spread]

    return life


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 1, 3), (1, 1, 3)),
        ((2, 1, 3), (1, 2, 1)),
        ((2, 1, 3), (1, 1, 0)),
        ((1, 2, 1), (1, 1, 1)),
        ((1, 2, 1), (2, 1, 3)),
        ((2, 1, 1), (1, 1, 2)),
        ((2, 1, 1), (1, 2, 0)),
        ((1, 2, 0), (2, 1, 2)),
        ((1, 2, 0), (1, 2, 3)),
    ],
    ids=lambda spread: "dp{}-tp{}-zero{}".format(*spread),
)
def test_a_learner_goes_on_under_another_layout(lives, model_path, saved, before, after):  # noqa: F811
    whole, folder = saved(before)
    ranks, tensor_parallel, _ = after
    batches = six_batches(ranks, 1)[3:]
    later = lives(ranks * tensor_parallel, model_path, section_of(after), batches, checkpoint=str(folder))
    names = ("actor/pg_loss", "actor/entropy", "actor/grad_norm", "actor/lr")
    for mine, theirs in zip(later[0].metrics, whole[0].metrics[3:], strict=True):
        for name in names:
            assert mine[name] == pytest.approx(theirs[name], abs=1e-5, rel=1e-5), name
    for name, weight in whole[0].weights.items():
        assert np.abs(later[0].weights[name] - weight).max() < 1e-4, name
    assert later[0].drawn == whole[0].drawn


@pytest.mark.parametrize(("before", "after"), [((2, 1, 3), (1, 1, 0)), ((1, 1, 0), (2, 1, 3))])
def test_a_reference_that_moves_is_cut_anew(lives, converted, model_path, tmp_path, before, after):  # noqa: F811
    """It became the policy after the second batch, and is the same in the fourth."""
    divergence = Divergence(estimator=KL_ESTIMATORS["k3"], term=Term(coef=0.1), refresh_steps=9)
    folder = tmp_path / "learner"
    batches = [six_batches(ranks, 1)[:4] for ranks, _, _ in (before, after)]
    whole = lives(
        before[0], model_path, section_of(before), batches[0], save_after=3, save_to=str(folder), kl=divergence
    )
    later = lives(
        after[0], model_path, section_of(after), batches[1][3:], checkpoint=str(converted(folder)), kl=divergence
    )
    wanted = whole[0].metrics[3]["actor/kl_loss"]
    assert wanted > 1e-4 and later[0].metrics[0]["actor/kl_loss"] == pytest.approx(wanted, rel=1e-3)


def test_masters_of_a_bfloat16_model_survive_another_layout(lives, converted, model_path, tmp_path):  # noqa: F811
    before, after = (2, 1, 2), (1, 1, 3)
    folder = tmp_path / "learner"
    whole = lives(
        2, model_path, section_of(before, **BFLOAT16), six_batches(2, 1)[:4], save_after=3, save_to=str(folder)
    )
    later = lives(
        1, model_path, section_of(after, **BFLOAT16), six_batches(1, 1)[3:4], checkpoint=str(converted(folder))
    )
    for name in ("actor/pg_loss", "actor/grad_norm"):
        assert later[0].metrics[0][name] == pytest.approx(whole[0].metrics[3][name], rel=2e-2), name
    for name, weight in whole[0].weights.items():
        assert np.abs(later[0].weights[name] - weight).max() <= 2 * LR, name


def test_without_zero_more_or_fewer_ranks_read_the_checkpoint_as_it_is(lives, model_path, tmp_path):  # noqa: F811
    folder = str(tmp_path / "learner")
    whole = lives(2, model_path, section_of((2, 1, 0)), six_batches(2, 1)[:4], save_after=3, save_to=folder)
    later = lives(1, model_path, section_of((1, 1, 0)), six_batches(1, 1)[3:4], checkpoint=folder)
    wanted = whole[0].metrics[3]
    for name in ("actor/pg_loss", "actor/grad_norm", "actor/lr"):
        assert later[0].metrics[0][name] == pytest.approx(wanted[name], abs=1e-5, rel=1e-5), name


def test_a_checkpoint_that_cannot_be_converted_leaves_nothing_and_says_why(tmp_path):
    folder = tmp_path / "learner"
    (folder / "deepspeed").mkdir(parents=True)
    (folder / "layout.json").write_text('{"ranks": 2, "zero_stage": 2, "tensor_parallel": 1}')
    with pytest.raises(CheckpointDamaged, match="could not be converted"):
        convert(folder, tmp_path / "converted", CONVERSION_S)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["learner"]


def test_a_conversion_has_a_deadline(tmp_path):
    (tmp_path / "learner").mkdir()
    with pytest.raises(WaitTimeout, match="the conversion of"):
        convert(tmp_path / "learner", tmp_path / "converted", 0.01)
