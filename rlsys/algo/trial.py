"""Small inputs of every name in the legend, to try a row's parameters out before a run starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rlsys.algo.rows import call_whole
from rlsys.algo.segments import Segments


def trial_inputs() -> dict[str, Any]:
    """Three tokens of two sequences, the last token without weight; one group of two rollouts of one turn each."""
    logprobs_T = torch.tensor([-0.1, -0.2, -0.3])
    rewards_S = torch.tensor([0.0, 1.0])
    names_T = ("policy", "anchor", "proximal", "behaviour", "ref", "teacher")
    return {
        **{f"{name}_logprobs_T": logprobs_T for name in names_T},
        **{name: logprobs_T for name in ("advantages_T", "entropy_T", "values_T", "old_values_T", "returns_T")},
        "candidate_logprobs_TK": logprobs_T[:, None],
        "teacher_candidate_logprobs_TK": logprobs_T[:, None],
        "rewards_T": torch.tensor([0.0, 1.0, 0.0]),
        "mask_T": torch.tensor([True, True, False]),
        "correct_T": torch.tensor([False, True, True]),
        "token_draws_T": torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64),
        "segments": Segments(torch.tensor([0, 1]), 3),
        "prompt_tokens_S": torch.tensor([2.0, 2.0]),
        "rewards_S": rewards_S,
        "scores_S": rewards_S,
        "truncated_S": torch.tensor([True, False]),
        "correct_S": torch.tensor([False, True]),
        "penalties_S": rewards_S,
        "draws_S": torch.tensor([0.1, 0.5], dtype=torch.float64),
        "answer_ids_N": torch.tensor([5, 6]),
        "answers": Segments(torch.tensor([0, 1]), 2),
        "max_tokens": 8,
        "greedy_rewards_S": rewards_S,
        "lengths_S": torch.tensor([1.0, 1.0]),
        "reward_parts_SK": rewards_S[:, None],
        "group_starts_G": torch.tensor([0]),
        "turn_rewards_U": rewards_S,
        "turn_keys_U": torch.tensor([0, 0]),
        "turn_states_U": torch.tensor([0, 0]),
        "turn_rollouts_U": torch.tensor([0, 1]),
        **{"kept": 0.1, "measured": 0.1, "rollouts": 2, "step": 0, "steps": 1},
    }


def try_row(function: Callable[..., Any]) -> Any:
    """Call a row, its parameters bound, with trial inputs.

    Raises:
        AssertionError, TypeError, ValueError: a parameter is unknown or out of range.
    """
    return call_whole(function, trial_inputs())
