"""The learner's predicted peak memory, against what real steps took."""

import pytest

from rlsys.config.schema import TrainSection
from rlsys.models.shape import shape_of
from rlsys.plan.memory import FACTOR, predict
from rlsys.plan.space import count_parameters
from tests.integration.learner_memory import LENGTH, Case, make_model, peaks

pytestmark = pytest.mark.engines

CASES = {
    "small": Case(width=256, layers=4, tokens=1024, train=TrainSection()),
    "large": Case(width=512, layers=6, tokens=512, train=TrainSection()),
    "sharded": Case(width=512, layers=6, tokens=512, train=TrainSection(zero_stage=2)),
    "bfloat16": Case(width=512, layers=6, tokens=512, train=TrainSection(dtype="bfloat16")),
    "computed again": Case(width=512, layers=6, tokens=1024, train=TrainSection(activation_checkpointing=True)),
    "adapters": Case(width=512, layers=6, tokens=1024, train=TrainSection(lora={"r": 8})),
}


def test_the_peak_of_real_steps_lies_within_the_factor_of_the_prediction(tmp_path):
    folders = [tmp_path / name for name in CASES]
    for case, folder in zip(CASES.values(), folders, strict=True):
        make_model(case, folder)
    for name, case, folder, peak in zip(
        CASES, CASES.values(), folders, peaks(list(CASES.values()), folders), strict=True
    ):
        wanted = predict(
            count_parameters(str(folder)), shape_of(str(folder)), case.train, tokens=case.tokens, longest=LENGTH
        )
        assert wanted.total / FACTOR <= peak <= wanted.total * FACTOR, (name, peak / wanted.total, wanted)
        print(f"{name}: {peak / 1e6:.0f} MB, {peak / wanted.total:.2f} of the prediction")
