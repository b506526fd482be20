"""SHAPINGS: what is made of the rewards of a group before they are compared: lengths, cuts and repetitions count.

Each row gives new rewards; several are applied one after another. Whether an answer is right, and what it scored, is
judged before any shaping. Legend: S rollouts of all groups in one row, G groups, N sampled tokens of all rollouts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlsys.algo.advantages.group import groups_of
from rlsys.algo.rows import Need, RowFacts, Scope, row, table
from rlsys.algo.segments import Segments


@row(
    RowFacts(
        source="DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 13",
        scope=Scope.SEQUENCE,
        peers={
            "verl": "overlong_buffer.{len, penalty_factor=1.0}, uncapped: a longer answer loses more than the factor",
            "OpenRLHF": "overlong_buffer_len, overlong_penalty_factor=1.0",
            "NeMo-RL": "overlong_buffer_length, overlong_buffer_penalty",
        },
    )
)
def overlong_penalty(
    rewards_S: Tensor, lengths_S: Tensor, max_tokens: int, *, buffer: int, factor: float = 1.0
) -> Tensor:
    """r - factor * min(max(length - (max_tokens - buffer), 0) / buffer, 1): the last tokens before the limit cost.

    Args:
        rewards_S: floating [S].
        lengths_S: [S], sampled tokens.
        max_tokens: the limit.
        buffer: tokens before the limit in which the penalty grows from 0 to ``factor``.
        factor: the largest penalty, 0 or more.
    """
    _check(rewards_S, lengths_S)
    assert buffer > 0 and factor >= 0.0, f"buffer={buffer}, factor={factor}"
    over_S = (lengths_S.double() - (max_tokens - buffer)) / buffer
    return _as(rewards_S.double() - factor * over_S.clamp(0.0, 1.0), rewards_S)


@row(
    RowFacts(
        source="ProRL v2, NVIDIA 2025, there called stop properly",
        scope=Scope.SEQUENCE,
        peers={
            "OpenRLHF": "stop_properly_penalty_coef, off by default",
            "NeMo-RL": "stop_properly_penalty_coef in [0, 1], off by default",
        },
    )
)
def truncated(rewards_S: Tensor, truncated_S: Tensor, *, coef: float = 0.0) -> Tensor:
    """The reward of an answer that was cut at the token limit: coef * r; or coef itself, where that is below 0.

    Args:
        coef: at most 1. From 0 to 1 it suits rewards of 0 and more: a negative one would be lifted by it.
    """
    _check(rewards_S, truncated_S)
    assert coef <= 1.0, f"coef={coef}"
    cut_S = rewards_S * coef if coef >= 0.0 else torch.full_like(rewards_S, coef)
    return torch.where(truncated_S, cut_S, rewards_S)


@row(
    RowFacts(
        source="Kimi k1.5, 2025, arXiv:2501.12599, section 2.3.3",
        scope=Scope.SEQUENCE,
        needs=(Need.GROUPS, Need.CORRECT_FLAGS),
        peers={"Kimi k1.5": "with a weight that is not published, left out at the beginning of a training"},
    )
)
def length_penalty(
    rewards_S: Tensor, lengths_S: Tensor, correct_S: Tensor, group_starts_G: Tensor, *, weight: float = 1.0
) -> Tensor:
    """r + weight * l, with l = 0.5 - (length - shortest) / (longest - shortest) of the group for a right answer, and
    min(l, 0) for a wrong one. A group of equal lengths keeps its rewards.

    Args:
        rewards_S: floating [S].
        lengths_S: [S], sampled tokens.
        correct_S: bool [S].
        group_starts_G: int64 [G].
        weight: 0 or more.
    """
    _check(rewards_S, lengths_S, correct_S)
    assert weight >= 0.0, f"weight={weight}"
    groups, lengths_S = groups_of(rewards_S, group_starts_G), lengths_S.double()
    everywhere_S = torch.ones_like(correct_S, dtype=torch.bool)
    longest_G, shortest_G = groups.max(lengths_S, everywhere_S), -groups.max(-lengths_S, everywhere_S)
    range_S = groups.spread(longest_G - shortest_G)
    longer_S = (lengths_S - groups.spread(shortest_G)) / range_S.clamp(min=1.0)
    bonus_S = torch.where(range_S == 0.0, 0.0, 0.5 - longer_S)
    bonus_S = torch.where(correct_S, bonus_S, bonus_S.clamp(max=0.0))
    return _as(rewards_S.double() + weight * bonus_S, rewards_S)


@row(
    RowFacts(
        source="Yeo et al. 2025, arXiv:2502.03373",
        scope=Scope.SEQUENCE,
        needs=(Need.CORRECT_FLAGS,),
        peers={
            "TRL": "get_cosine_scaled_reward, right 1.0 to 0.5, wrong -1.0 to -0.5, nothing for exceeding",
            "ms-swift": "cosine, right 1.0 to 0.5, wrong -1.0 to -0.5",
        },
    )
)
def cosine_length(
    rewards_S: Tensor,
    lengths_S: Tensor,
    correct_S: Tensor,
    truncated_S: Tensor,
    max_tokens: int,
    *,
    correct_short: float = 2.0,
    correct_long: float = 1.0,
    wrong_short: float = -10.0,
    wrong_long: float = 0.0,
    exceeded: float = -10.0,
) -> Tensor:
    """long + (short - long) * (1 + cos(pi * length / max_tokens)) / 2, with the ends of right or of wrong answers;
    ``exceeded`` for one that was cut at the limit. Takes the place of the rewards, with what was done to them before.

    Args:
        rewards_S: floating [S], of which nothing but the type is used.
        lengths_S: [S], sampled tokens; of several turns together at most ``max_tokens`` count.
        correct_S, truncated_S: bool [S].
        correct_short, wrong_short: reward of an answer without tokens.
        correct_long, wrong_long: reward of one as long as ``max_tokens``.
    """
    _check(rewards_S, lengths_S, correct_S, truncated_S)
    share_S = (lengths_S.double() / max_tokens).clamp(max=1.0)
    short_S, long_S = (
        torch.where(correct_S, right, wrong).double()
        for right, wrong in ((correct_short, wrong_short), (correct_long, wrong_long))
    )
    shaped_S = long_S + (short_S - long_S) * (1.0 + torch.cos(math.pi * share_S)) / 2.0
    return _as(torch.where(truncated_S, exceeded, shaped_S), rewards_S)


@row(
    RowFacts(
        source="Yeo et al. 2025, arXiv:2502.03373, who lay it on the repeated tokens; by shares as in TRL",
        scope=Scope.SEQUENCE,
        peers={"TRL": "get_repetition_penalty_reward, ngram_size=3, max_penalty=-1.0, over words"},
    )
)
def repetition_penalty(
    rewards_S: Tensor, answer_ids_N: Tensor, answers: Segments, *, n: int = 40, coef: float = 1.0
) -> Tensor:
    """r - coef * (1 - different n-grams / n-grams) of the sampled tokens; r for an answer of fewer than n.

    Args:
        rewards_S: floating [S].
        answer_ids_N: int64 [N].
        answers: the rollouts' segments of N.
        n: tokens of an n-gram, above 0.
        coef: the largest penalty, 0 or more.
    """
    _check(rewards_S, answers.starts_S)
    assert answer_ids_N.shape == (answers.num_tokens,), f"answer ids: {answer_ids_N.shape}"
    assert n > 0 and coef >= 0.0, f"n={n}, coef={coef}"
    counts_S = (answers.lengths_S - (n - 1)).clamp(min=0)
    positions_N = torch.arange(answers.num_tokens, device=answer_ids_N.device)
    is_whole_N = positions_N + n <= answers.spread(answers.starts_S + answers.lengths_S)
    grams_N = _pair(answers.index_T, _ngrams(answer_ids_N, n))
    first_N = torch.full_like(positions_N, answers.num_tokens)  # of each different n-gram, where it first begins
    first_N = first_N.scatter_reduce(0, grams_N[is_whole_N], positions_N[is_whole_N], "amin")
    different_S = torch.bincount(answers.index_T[first_N[first_N < answers.num_tokens]], minlength=counts_S.numel())
    share_S = torch.where(counts_S > 0, 1.0 - different_S.double() / counts_S.clamp(min=1), 0.0)
    return _as(rewards_S.double() - coef * share_S, rewards_S)


def _ngrams(ids_N: Tensor, n: int) -> Tensor:
    """A number for each place, int64 [N], the same for the same ``n`` tokens from there on (around the end of the row).

    A longer n-gram is a pair of two shorter ones that may overlap: log2(n) steps, and exact, unlike a hash.
    """
    numbers_N, reach = torch.unique(ids_N, return_inverse=True)[1], 1
    while reach < n:
        step = min(reach, n - reach)
        numbers_N = _pair(numbers_N, torch.roll(numbers_N, -step))
        reach += step
    return numbers_N


def _pair(first_N: Tensor, second_N: Tensor) -> Tensor:
    """A number below N for each different pair, int64 [N]. Both hold numbers from 0 to N - 1."""
    return torch.unique(first_N * first_N.numel() + second_N, return_inverse=True)[1]


def _check(rewards_S: Tensor, *others: Tensor) -> None:
    assert rewards_S.ndim == 1 and rewards_S.is_floating_point(), f"rewards: {rewards_S.shape} {rewards_S.dtype}"
    assert all(other.shape == rewards_S.shape for other in others), [other.shape for other in (rewards_S, *others)]


def _as(shaped_S: Tensor, rewards_S: Tensor) -> Tensor:
    return shaped_S.to(rewards_S.dtype)


SHAPINGS = table(overlong_penalty, truncated, length_penalty, cosine_length, repetition_penalty)
