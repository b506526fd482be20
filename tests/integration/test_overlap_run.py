"""A run of `rlsys bench overlap` on the real engines: its rollouts have the lengths that were fixed beforehand."""

import pytest

from rlsys.bench.overlap_runs import PARTIAL, Sizes, config_of, inputs_of, lengths_of, make_model, run_mode

pytestmark = pytest.mark.engines

SIZES = Sizes(steps=3, prompts=4, group_size=4, slots=8, longest=60, tokens_per_microbatch=512, width=64, layers=2)


def test_no_answer_ends_before_its_length_though_weights_come_meanwhile(tmp_path):
    make_model(tmp_path / "model", SIZES)
    config = config_of(PARTIAL, SIZES, tmp_path)
    lengths = lengths_of(config, inputs_of(config, tmp_path / "model"))
    assert len(lengths) == 48 and max(lengths) == 60  # some are cut at the longest

    found = run_mode(config, inputs_of(config, tmp_path / "model"))  # raises where other work was done

    assert 2 <= found.published <= 4  # of the start, after each step, less those that were overtaken
    assert found.wall_s > 0.0 and found.batch_s == found.wall_s / 3
    assert 0.0 <= found.trainer_idle <= 1.0 and 0.0 <= found.rollout_idle <= 1.0
