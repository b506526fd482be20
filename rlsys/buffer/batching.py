"""Which finished groups make a batch: so many questions, or so many tokens. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlsys.records import RolloutGroup

BatchBy = Literal["prompts", "trained_tokens", "sampled_tokens"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRule:
    """When a batch is there.

    * ``prompts``: ``prompts`` groups.
    * ``trained_tokens``: as many groups as hold at most ``tokens`` sampled tokens, once that many are there. Batches
      then differ in groups, not in tokens (C3PO, Ring-lite, arXiv:2506.14731; whole groups here, where C3PO picks
      single responses).
    * ``sampled_tokens``: all that is finished once the engines have ended ``tokens`` tokens since the last batch. What
      is not finished goes on under the next weights, so that no batch waits for its slowest answer (C3PO++, Ring-1T,
      arXiv:2510.18855; a token counts when its rollout ends, since generation never stops to be counted).

    Attributes:
        prompts: groups; under a budget of trained tokens, those that may be unfinished for each batch of lead; under
            one of sampled tokens, those that may be unfinished.
        tokens: the budget; of no meaning under ``prompts``.

    Example:
        >>> rule = BatchRule(by="trained_tokens", prompts=4, tokens=100)
        >>> rule.num_ready([40, 40]), rule.num_ready([40, 40, 40])
        (0, 2)
    """

    by: BatchBy = "prompts"
    prompts: int
    tokens: int = 0

    def num_ready(self, tokens_G: Sequence[int]) -> int:
        """How many of the finished groups, from the first one on, make a batch; 0: there is none yet.

        Args:
            tokens_G: sampled tokens of each, by ``sampled_tokens``.
        """
        match self.by:
            case "prompts":
                return self.prompts if len(tokens_G) >= self.prompts else 0
            case "sampled_tokens":  # whoever takes knows that the budget is spent
                return len(tokens_G)
            case "trained_tokens":
                total = 0
                for index, tokens in enumerate(tokens_G):
                    total += tokens
                    if total >= self.tokens:
                        # a group that is longer than the budget is a batch of its own
                        return index + 1 if total == self.tokens or index == 0 else index
                return 0


def sampled_tokens(group: RolloutGroup) -> int:
    """Of all rollouts that the group still holds."""
    return sum(rollout.num_sampled_tokens for rollout in group.rollouts)
