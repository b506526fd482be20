"""How far the policy that learns is from the one that sampled: measures that are always on, under verl's names.

k = proximal / behaviour of each token that behaviour sampled; the perplexity of a sequence is exp(-mean logprob).
Legend: T packed tokens, S sequences.
"""

from __future__ import annotations

from torch import Tensor

from rlsys.algo.measures import EffectiveShare, Max, Mean, Measure, Min, Std
from rlsys.algo.ratios import bounded, detached_log_ratio
from rlsys.algo.segments import Segments


def token_distance(
    proximal_logprobs_T: Tensor, behaviour_logprobs_T: Tensor, mask_T: Tensor, on_policy_mask_T: Tensor
) -> dict[str, Measure]:
    """``kl`` = E[-log k] and ``k3_kl`` = E[k - 1 - log k] both estimate KL(behaviour || proximal).

    ``chi2_token`` = E[k^2] - 1. ``ratio_max`` is the largest k, before any bound. ``on_policy_*`` is over the tokens
    that the very version trained has sampled.
    """
    log_k_T = detached_log_ratio(proximal_logprobs_T, behaviour_logprobs_T, mask_T)
    k_T = log_k_T.double().exp()
    gap_T = (proximal_logprobs_T.detach() - behaviour_logprobs_T).abs()
    return {
        "rollout_corr/kl": Mean.of(-log_k_T, mask_T),
        "rollout_corr/k3_kl": Mean.of(k_T - 1.0 - log_k_T, mask_T),
        "rollout_corr/chi2_token": Mean.of(k_T.square() - 1.0, mask_T),
        "rollout_corr/ratio_max": Max.of(k_T, mask_T),
        "rollout_corr/logprob_abs_diff_mean": Mean.of(gap_T, mask_T),
        "rollout_corr/logprob_abs_diff_max": Max.of(gap_T, mask_T),
        "rollout_corr/on_policy_logprob_abs_diff_mean": Mean.of(gap_T, mask_T & on_policy_mask_T),
    }


def sequence_distance(
    proximal_logprobs_T: Tensor, behaviour_logprobs_T: Tensor, mask_T: Tensor, segments: Segments
) -> dict[str, Measure]:
    """Perplexities and their ratio, and ``chi2_seq`` = E[(product of k over the sequence)^2] - 1."""
    is_sequence_S = segments.count(mask_T) > 0.0
    training_S = -segments.mean(proximal_logprobs_T.detach().double(), mask_T)
    rollout_S = -segments.mean(behaviour_logprobs_T.detach().double(), mask_T)
    log_k_T = detached_log_ratio(proximal_logprobs_T, behaviour_logprobs_T, mask_T)
    product_S = bounded(segments.sum(log_k_T.double(), mask_T)).exp()
    difference_S = training_S - rollout_S
    return {
        "rollout_corr/training_ppl": Mean.of(training_S.exp(), is_sequence_S),
        "rollout_corr/training_log_ppl": Mean.of(training_S, is_sequence_S),
        "rollout_corr/rollout_ppl": Mean.of(rollout_S.exp(), is_sequence_S),
        "rollout_corr/rollout_log_ppl": Mean.of(rollout_S, is_sequence_S),
        "rollout_corr/log_ppl_diff": Mean.of(difference_S, is_sequence_S),
        "rollout_corr/log_ppl_abs_diff": Mean.of(difference_S.abs(), is_sequence_S),
        "rollout_corr/log_ppl_diff_max": Max.of(difference_S, is_sequence_S),
        "rollout_corr/log_ppl_diff_min": Min.of(difference_S, is_sequence_S),
        "rollout_corr/ppl_ratio": Mean.of(difference_S.exp(), is_sequence_S),
        "rollout_corr/chi2_seq": Mean.of(product_S.square() - 1.0, is_sequence_S),
    }


def weight_measures(weights_T: Tensor, kept_T: Tensor, mask_T: Tensor) -> dict[str, Measure]:
    """Of the weights as they are applied, and the share of tokens that was rejected.

    Args:
        weights_T: [T].
        kept_T: bool [T], the tokens left.
        mask_T: bool [T], the tokens before any was rejected.
    """
    return {
        "rollout_corr/rollout_is_mean": Mean.of(weights_T, kept_T),
        "rollout_corr/rollout_is_std": Std.of(weights_T, kept_T),
        "rollout_corr/rollout_is_max": Max.of(weights_T, kept_T),
        "rollout_corr/rollout_is_min": Min.of(weights_T, kept_T),
        "rollout_corr/rollout_is_eff_sample_size": EffectiveShare.of(weights_T, kept_T),
        "rollout_corr/rollout_rs_masked_fraction": Mean.share(~kept_T, mask_T),
    }


def rejected_sequences(kept_T: Tensor, mask_T: Tensor, segments: Segments) -> dict[str, Measure]:
    """Share of sequences that lost every token."""
    is_gone_S = segments.count(kept_T) == 0.0
    is_sequence_S = segments.count(mask_T) > 0.0
    return {"rollout_corr/rollout_rs_seq_masked_fraction": Mean.share(is_gone_S, is_sequence_S)}
