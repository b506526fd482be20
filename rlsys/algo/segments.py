"""Boundaries of sequences in one packed 1-D tensor, and every reduction over them, without a loop over sequences.

Legend: T packed tokens, S sequences (or groups, where the things packed are rewards).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Where each sequence begins. Together they cover all T tokens: padding belongs to a sequence too, and is masked.

    Sums and means are taken in float64 and handed back in the dtype of the values, with gradient.

    Attributes:
        starts_S: int64 [S], ascending, the first is 0; empty where there is no token.
        num_tokens: T.
        index_T: int64 [T], the sequence of each token.

    Example:
        >>> Segments(torch.tensor([0, 3]), 5).sum(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).tolist()
        [6.0, 9.0]
    """

    starts_S: Tensor
    num_tokens: int
    index_T: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert self.starts_S.ndim == 1 and self.starts_S.dtype == torch.int64, f"starts: {self.starts_S.dtype}"
        if self.starts_S.numel():
            assert int(self.starts_S[0]) == 0, "the first segment starts at 0"
            assert bool((self.lengths_S > 0).all()), f"starts must ascend and lie below {self.num_tokens}"
        else:
            assert self.num_tokens == 0, f"{self.num_tokens} tokens in no segment"
        object.__setattr__(self, "index_T", torch.repeat_interleave(self.lengths_S))

    @property
    def num_segments(self) -> int:
        return self.starts_S.numel()

    @property
    def lengths_S(self) -> Tensor:
        """int64 [S], tokens of each sequence, masked ones included."""
        return torch.diff(self.starts_S, append=self.starts_S.new_tensor([self.num_tokens]))

    def spread(self, values_S: Tensor) -> Tensor:
        """[S] to [T]: each token gets the value of its sequence."""
        return values_S[self.index_T]

    def sum(self, values_T: Tensor, mask_T: Tensor | None = None) -> Tensor:
        """[T] to [S], over the tokens of ``mask_T`` (bool; None takes all)."""
        kept_T = values_T if mask_T is None else torch.where(mask_T, values_T, 0.0)
        zeros_S = torch.zeros(self.num_segments, dtype=torch.float64, device=values_T.device)
        return zeros_S.index_add(0, self.index_T, kept_T.double()).to(values_T.dtype)

    def count(self, mask_T: Tensor) -> Tensor:
        """Tokens of ``mask_T`` in each sequence, float64 [S]."""
        return self.sum(mask_T.double())

    def mean(self, values_T: Tensor, mask_T: Tensor) -> Tensor:
        """[T] to [S], over the tokens of ``mask_T``; 0 for a sequence without any."""
        counts_S = self.count(mask_T).clamp(min=1.0)
        return (self.sum(torch.where(mask_T, values_T, 0.0).double()) / counts_S).to(values_T.dtype)

    def max(self, values_T: Tensor, mask_T: Tensor) -> Tensor:
        """[T] to [S], over the tokens of ``mask_T``; -inf for a sequence without any."""
        lowest_S = torch.full((self.num_segments,), -torch.inf, dtype=values_T.dtype, device=values_T.device)
        return lowest_S.scatter_reduce(0, self.index_T, torch.where(mask_T, values_T, -torch.inf), "amax")

    def suffix_sum(self, values_T: Tensor, discount: float) -> Tensor:
        """sum over k >= t of discount^(k - t) * values_k within the sequence of t, [T].

        Doubles the reach of each token's sum until it covers the longest sequence: log2(length) steps, and nothing is
        ever divided by a power of the discount.
        """
        ends_T = self.spread(self.starts_S + self.lengths_S)
        positions_T = torch.arange(self.num_tokens, device=values_T.device)
        longest = int(self.lengths_S.max()) if self.num_segments else 0
        total_T, reach = values_T, 1
        while reach < longest:
            ahead_T = torch.where(positions_T + reach < ends_T, torch.roll(total_T, -reach), 0.0)
            total_T = total_T + discount**reach * ahead_T
            reach *= 2
        return total_T

    def spans(self, mask_T: Tensor) -> Segments:
        """Each run of masked-in tokens as a segment of its own: the turns of a conversation.

        The tokens behind a run, up to the next one, belong to it; they carry no weight.
        """
        before_T = torch.roll(mask_T, 1)
        begins_T = mask_T & ~before_T
        begins_T[self.starts_S] = True
        return Segments(torch.nonzero(begins_T).squeeze(1), self.num_tokens)

    def only(self, mask_T: Tensor) -> Segments:
        """The segments of ``values_T[mask_T]``: tokens outside the mask, and sequences left empty by that, are gone."""
        counts_S = torch.bincount(self.index_T[mask_T], minlength=self.num_segments)
        counts_S = counts_S[counts_S > 0]
        return Segments(counts_S.cumsum(0) - counts_S, int(counts_S.sum()))
