"""SELECTIONS: which rollouts of a group are trained, and whose rewards the others are compared with.

Legend: S rollouts of all groups in one row, G groups, H sets of rollouts that share group and correctness.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.algo.advantages.group import groups_of
from rlsys.algo.rows import Need, RowFacts, Scope, row, table
from rlsys.algo.segments import Segments


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What a selection returns.

    Attributes:
        keep_S: bool [S], rollouts that are trained.
        baseline_S: bool [S], rollouts whose rewards stay in their group's baseline: all that are kept, and more.
    """

    keep_S: Tensor
    baseline_S: Tensor

    def __post_init__(self) -> None:
        assert self.keep_S.dtype == self.baseline_S.dtype == torch.bool, "a selection is a pair of masks"
        assert not bool((self.keep_S & ~self.baseline_S).any()), "a rollout is trained against its own reward too"


@row(
    RowFacts(
        source="dynamic sampling of DAPO, Yu et al. 2025, arXiv:2503.14476",
        scope=Scope.SEQUENCE,
        needs=(Need.GROUPS,),
        peers={
            "verl": "filter_groups.{enable, metric}, at most max_num_gen_batches=10",
            "SkyRL": "dynamic_sampling.type=filter",
            "NeMo-RL": "use_dynamic_sampling",
            "slime": "dynamic_sampling_filter_path=check_reward_nonzero_std",
            "PipelineRL": "filter_zero_advantage_groups",
            "prime-rl": "filter_zero_advantages=True",
        },
    )
)
def zero_variance(scores_S: Tensor, group_starts_G: Tensor) -> Selection:
    """A group whose scores are all equal leaves: its advantages would all be 0.

    Args:
        scores_S: floating [S], before any shaping, which would make a difference of lengths alone.
        group_starts_G: int64 [G].
    """
    groups = groups_of(scores_S, group_starts_G)
    everywhere_S = torch.ones_like(scores_S, dtype=torch.bool)
    is_varied_G = groups.max(scores_S, everywhere_S) > -groups.max(-scores_S, everywhere_S)
    return _whole_groups(is_varied_G, groups)


@row(
    RowFacts(
        source="dynamic filtering, as in the code of OpenRLHF",
        scope=Scope.SEQUENCE,
        needs=(Need.GROUPS,),
        peers={"OpenRLHF": "dynamic_filtering, dynamic_filtering_reward_range=0 1"},
    )
)
def mean_between(scores_S: Tensor, group_starts_G: Tensor, *, low: float = 0.0, high: float = 1.0) -> Selection:
    """A group stays where low < mean score < high: neither too hard nor too easy.

    Args:
        scores_S: floating [S], before any shaping.
        group_starts_G: int64 [G].
        low, high: both outside.
    """
    assert low < high, f"low={low}, high={high}"
    groups = groups_of(scores_S, group_starts_G)
    mean_G = groups.mean(scores_S.double(), torch.ones_like(scores_S, dtype=torch.bool))
    return _whole_groups((low < mean_G) & (mean_G < high), groups)


@row(
    RowFacts(
        source="overlong filtering of DAPO, Yu et al. 2025, arXiv:2503.14476",
        scope=Scope.SEQUENCE,
        peers={
            "TRL": "mask_truncated_completions",
            "NeMo-RL": "overlong_filtering",
            "PipelineRL": "overlong_filtering",
            "SkyRL": "apply_overlong_filtering",
        },
    )
)
def overlong(truncated_S: Tensor) -> Selection:
    """Answers that were cut at the token limit are not trained; their rewards stay in the baseline."""
    assert truncated_S.ndim == 1 and truncated_S.dtype == torch.bool, f"truncated: {truncated_S.dtype}"
    return Selection(keep_S=~truncated_S, baseline_S=torch.ones_like(truncated_S))


@row(
    RowFacts(
        source="GRPO-RoC of rStar2-Agent, Shang et al. 2025, arXiv:2508.20722",
        scope=Scope.SEQUENCE,
        needs=(Need.GROUPS, Need.CORRECT_FLAGS),
        peers={"rStar2-Agent": "down_sample_to_n=16 of 32; at least 2 right and 2 wrong ones where there are"},
    )
)
def roc(correct_S: Tensor, penalties_S: Tensor, draws_S: Tensor, group_starts_G: Tensor, *, keep: int) -> Selection:
    """An oversampled group is cut down to ``keep``, right and wrong answers in their proportion, at least one of each.

    The wrong ones are drawn at random, so that failures stay varied; of the right ones those with the least penalty
    stay, so that success is clean. The rewards of what leaves are gone from the baseline too.

    Args:
        correct_S: bool [S].
        penalties_S: floating [S]; their size counts, not their sign, since a penalty may be given as what is taken off.
        draws_S: float64 [S] in [0, 1); ties of the penalty go by it as well.
        group_starts_G: int64 [G].
        keep: rollouts of each group that are trained, 2 or more; a smaller group stays as it is.
    """
    assert keep >= 2, f"keep={keep}"
    assert correct_S.shape == penalties_S.shape == draws_S.shape, f"{correct_S.shape}, {penalties_S.shape}"
    groups = groups_of(draws_S, group_starts_G)
    sizes_G, right_G = groups.lengths_S, groups.sum(correct_S.double()).long()
    wrong_G = sizes_G - right_G
    # half up, in integers; never so many that the other kind is gone where there was some
    wrong_kept_G = (2 * wrong_G * keep + sizes_G) // (2 * sizes_G)
    wrong_kept_G = torch.minimum(wrong_kept_G.maximum(wrong_G.clamp(max=1)), keep - right_G.clamp(max=1))
    kept_G2 = torch.stack([wrong_kept_G, keep - wrong_kept_G], dim=1)
    kept_G2 = torch.where((sizes_G > keep)[:, None], kept_G2, sizes_G[:, None])

    penalties_S = torch.where(correct_S, penalties_S.abs().double(), 0.0)
    kind_S = 2 * groups.index_T + correct_S.long()
    order_S = torch.argsort(draws_S, stable=True)
    for key_S in (penalties_S, kind_S):  # the last key counts most
        order_S = order_S[torch.argsort(key_S[order_S], stable=True)]
    counts_H = torch.unique_consecutive(kind_S[order_S], return_counts=True)[1]
    kinds = Segments(counts_H.cumsum(0) - counts_H, order_S.numel())
    rank_S = torch.arange(order_S.numel(), device=order_S.device) - kinds.spread(kinds.starts_S)
    keep_S = torch.empty_like(correct_S)
    keep_S[order_S] = rank_S < kept_G2.flatten()[kind_S[order_S]]
    return Selection(keep_S=keep_S, baseline_S=keep_S)


def _whole_groups(keep_G: Tensor, groups: Segments) -> Selection:
    keep_S = groups.spread(keep_G)
    return Selection(keep_S=keep_S, baseline_S=torch.ones_like(keep_S))


SELECTIONS = table(zero_variance, mean_between, overlong, roc)
