"""AGGREGATIONS: what each token's loss is multiplied by, and what the sum is divided by once, over all ranks.

Each row gives a coefficient for each token and this microbatch's share of the count. The loss of a step is the sum over
all microbatches and ranks of coefficient * loss, divided by the sum of the counts, or by nothing where the row has no
count. A sequence without a weighted token is no sequence. Legend: T packed tokens, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.algo.rows import RowFacts, Scope, row, table
from rlsys.algo.segments import Segments


@dataclass(frozen=True, kw_only=True, slots=True)
class Aggregate:
    """What an aggregation returns.

    Attributes:
        coefficients_T: float32 [T], 0 where the mask is False.
        count: 0-d float64, added over microbatches and ranks; None where the sum is divided by nothing.
    """

    coefficients_T: Tensor
    count: Tensor | None


def _num_sequences(mask_T: Tensor, segments: Segments) -> Tensor:
    return (segments.count(mask_T) > 0.0).sum().double()


@row(
    RowFacts(
        source="DAPO, Yu et al. 2025, arXiv:2503.14476",
        peers={
            "verl": "token-mean, its default",
            "TRL": 'loss_type="dapo", its default; "bnpo" divides by the tokens of the local batch',
            "OpenRLHF": "its default",
            "AReaL": "its only one",
            "SkyRL": "token_mean",
            "NeMo-RL": "token_level_loss=True",
        },
    )
)
def token_mean(mask_T: Tensor) -> Aggregate:
    """Sum over tokens / number of tokens: every token weighs the same."""
    return Aggregate(coefficients_T=mask_T.float(), count=mask_T.sum().double())


@row(RowFacts(source="as in verl", peers={"verl": "token-sum"}))
def token_sum(mask_T: Tensor) -> Aggregate:
    """Sum over tokens, divided by nothing."""
    return Aggregate(coefficients_T=mask_T.float(), count=None)


@row(
    RowFacts(
        source="GRPO, Shao et al. 2024, arXiv:2402.03300",
        scope=Scope.SEQUENCE,
        peers={
            "verl": "seq-mean-token-mean",
            "TRL": 'loss_type="grpo"',
            "SkyRL": "sequence_mean",
            "NeMo-RL": "token_level_loss=False",
        },
    )
)
def seq_mean_token_mean(mask_T: Tensor, segments: Segments) -> Aggregate:
    """Mean over sequences of the mean over their tokens: every sequence weighs the same, a long one's tokens less."""
    per_token_S = 1.0 / segments.count(mask_T).clamp(min=1.0)
    coefficients_T = torch.where(mask_T, segments.spread(per_token_S), 0.0).float()
    return Aggregate(coefficients_T=coefficients_T, count=_num_sequences(mask_T, segments))


@row(RowFacts(source="as in verl", scope=Scope.SEQUENCE, peers={"verl": "seq-mean-token-sum"}))
def seq_mean_token_sum(mask_T: Tensor, segments: Segments) -> Aggregate:
    """Mean over sequences of the sum over their tokens."""
    return Aggregate(coefficients_T=mask_T.float(), count=_num_sequences(mask_T, segments))


@row(
    RowFacts(
        source="Dr. GRPO, Liu et al. 2025, arXiv:2503.20783",
        scope=Scope.SEQUENCE,
        peers={
            "verl": "seq-mean-token-sum-norm, loss_scale_factor: the padded width where unset",
            "TRL": 'loss_type="dr_grpo": divided by max_completion_length',
            "SkyRL": "seq_mean_token_sum_norm",
        },
    )
)
def seq_mean_token_sum_norm(mask_T: Tensor, segments: Segments, *, max_tokens: int) -> Aggregate:
    """Mean over sequences of (the sum over their tokens / max_tokens).

    Args:
        max_tokens: the longest response allowed. A constant: the width of a padded batch would change with the packing.
    """
    assert max_tokens > 0, f"max_tokens={max_tokens}"
    return Aggregate(coefficients_T=mask_T.float() / max_tokens, count=_num_sequences(mask_T, segments))


@row(RowFacts(source="C3PO of Ring-lite, 2025, arXiv:2506.14731", peers={"Ring-lite": "Phi = 409,600"}))
def constant(mask_T: Tensor, *, tokens: int) -> Aggregate:
    """Sum over tokens / tokens, the budget of trained tokens of a step: a long batch moves the policy further.

    Args:
        tokens: the budget, above 0.
    """
    assert tokens > 0, f"tokens={tokens}"
    return Aggregate(coefficients_T=mask_T.float() / tokens, count=None)


@row(
    RowFacts(
        source="mean over prompts, as in SkyRL",
        scope=Scope.SEQUENCE,
        peers={"SkyRL": "prompt_mean", "PipelineRL": "group_normalization, much alike"},
    )
)
def prompt_mean(mask_T: Tensor, segments: Segments, prompt_tokens_S: Tensor) -> Aggregate:
    """Mean over prompts of the mean over the tokens of all their rollouts: every prompt weighs the same.

    A prompt whose rollouts lie in several microbatches is counted in parts, tokens here / tokens of the prompt.

    Args:
        prompt_tokens_S: float [S], weighted tokens of the prompt's rollouts over the whole batch, before rejection.
    """
    assert prompt_tokens_S.shape == segments.starts_S.shape, f"prompt tokens: {prompt_tokens_S.shape}"
    per_token_S = 1.0 / prompt_tokens_S.double().clamp(min=1.0)
    coefficients_T = torch.where(mask_T, segments.spread(per_token_S), 0.0)
    return Aggregate(coefficients_T=coefficients_T.float(), count=coefficients_T.sum())


AGGREGATIONS = table(
    token_mean,
    token_sum,
    seq_mean_token_mean,
    seq_mean_token_sum,
    seq_mean_token_sum_norm,
    constant,
    prompt_mean,
)
