"""Metrics of a trained batch."""

from __future__ import annotations

from dataclasses import replace

from rlsys.controller.stats import batch_metrics, recomputed_tokens
from tests.builders import make_group


def test_scores_are_what_the_function_gave_and_rewards_what_shaping_made_of_them():
    group = make_group(0, [[0], [0]], rewards=[0.75, -0.5])
    first, second = group.rollouts
    shaped = replace(group, rollouts=(replace(first, shaped_by=-0.25), replace(second, shaped_by=-0.5)))
    metrics = batch_metrics([shaped], [0, 0])
    assert [metrics[f"critic/score/{name}"] for name in ("mean", "min", "max")] == [0.5, 0.0, 1.0]
    assert [metrics[f"critic/rewards/{name}"] for name in ("mean", "min", "max")] == [0.125, -0.5, 0.75]


def test_equal_rewards_teach_nothing_unless_the_greedy_one_differs():
    equal = make_group(0, [[0], [0]], rewards=[1.0, 1.0])
    groups = [equal, replace(equal, greedy_reward=1.0), replace(equal, greedy_reward=0.0), make_group(1, [[0], [0]])]
    assert batch_metrics(groups, [0] * 8)["critic/groups_without_variance"] == 2 / 4


def test_what_stood_before_a_change_of_version_is_computed_again():
    # two prompt tokens, then four of version 1 and three of version 2: six tokens stood when it changed
    group = make_group(0, [[1, 1, 1, 1, 2, 2, 2], [2, 2]])
    changed, whole = group.rollouts
    before = len(changed.token_ids_T) - 7 + 4
    assert recomputed_tokens([group]) == before
    assert recomputed_tokens([replace(group, rollouts=(whole,))]) == 0
