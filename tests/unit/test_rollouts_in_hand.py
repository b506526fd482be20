"""How many rollouts an engine is given at once."""

from rlsys.actors.setup import make_plan, rollouts_in_hand
from rlsys.config.presets import resolve
from rlsys.config.schema import Config


def test_half_as_many_again_wait_inside_the_engine_where_a_swap_lines_all_of_them_up_again():
    assert [rollouts_in_hand(24, mode) for mode in ("recompute", "keep", "drain")] == [36, 24, 24]
    assert rollouts_in_hand(1, "recompute") == 1 and rollouts_in_hand(512, "recompute") == 528


def test_the_plan_of_a_run_has_them():
    sections = {"data": {"task": {"name": "reversed_sum"}}, "algo": {"preset": "grpo"}, "rollout": {"slots": 10}}
    assert make_plan(resolve(Config.model_validate(sections))).slots == 15
