"""What it costs to train a row of tokens, as far as it grows with the row's length. Only ratios count."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCost:
    """Of a model. A row of L tokens costs ``linear * L + attention * L**2``.

    Attributes:
        linear: of a token in every layer but attention.
        attention: of a pair of tokens in causal attention, over the square of the length: half the pairs are masked,
            and left out where one sample has the row alone.

    Example:
        >>> TokenCost(linear=2.0, attention=0.5).of(4)
        16.0
    """

    linear: float
    attention: float

    def of(self, length: int) -> float:
        """A sample alone in its row."""
        return self.linear * length + self.attention * length**2

    def of_shared(self, length: int) -> float:
        """A row that several samples share: the mask that keeps them apart is dense, so that no pair is left out."""
        return self.linear * length + 2.0 * self.attention * length**2


BY_TOKENS = TokenCost(linear=1.0, attention=0.0)
