"""Advantages from rewards, on packed 1-D tensors with segment boundaries.

Legend: S sequences of all groups in one row, G groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def grpo(rewards_S: Tensor, group_starts: Tensor, *, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Group-relative advantages: (r - mean of the group) / (std of the group + eps), the std unbiased.

    From DeepSeekMath (arXiv 2402.03300). ``scale_by_std=False`` leaves the division out (Dr. GRPO, arXiv 2503.20783).
    A group whose rewards are all equal, or that has one member, gets 0: no noise of rounding is blown up by 1 / eps.

    Args:
        rewards_S: floating, [S], the groups one after another.
        group_starts: int64, [G], ascending, index of the first reward of each group; the first is 0.

    Returns:
        [S], the dtype of ``rewards_S``.
    """
    assert rewards_S.ndim == 1 and rewards_S.is_floating_point(), f"rewards: {rewards_S.shape} {rewards_S.dtype}"
    assert group_starts.ndim == 1 and group_starts.dtype == torch.int64, f"starts: {group_starts.dtype}"
    if rewards_S.numel() == 0:
        return rewards_S.clone()
    assert int(group_starts[0]) == 0, "the first group starts at 0"
    end = group_starts.new_tensor([rewards_S.numel()])
    sizes_G = torch.diff(group_starts, append=end)
    assert bool((sizes_G > 0).all()), "group starts must ascend and lie within the rewards"

    values_S = rewards_S.double()
    group_S = torch.repeat_interleave(sizes_G)
    zeros_G = values_S.new_zeros(sizes_G.numel())
    centred_S = values_S - (zeros_G.index_add(0, group_S, values_S) / sizes_G)[group_S]
    lowest_G = zeros_G.scatter_reduce(0, group_S, values_S, "amin", include_self=False)
    highest_G = zeros_G.scatter_reduce(0, group_S, values_S, "amax", include_self=False)
    centred_S = torch.where((lowest_G == highest_G)[group_S], 0.0, centred_S)
    if scale_by_std:
        variance_G = zeros_G.index_add(0, group_S, centred_S.square()) / (sizes_G - 1).clamp(min=1)
        centred_S = centred_S / (variance_G.sqrt()[group_S] + eps)
    return centred_S.to(rewards_S.dtype)


ADVANTAGES: dict[str, Callable[..., Tensor]] = {"grpo": grpo}
