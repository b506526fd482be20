"""The weights of the loss's further terms, divergence and entropy, as they move from step to step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rlsys.algo.coefficients import Coefficient, fixed
from rlsys.algo.rows import call_row


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """Attributes:
    coef: weight in the first step.
    control: row of COEFFICIENTS, its parameters bound.
    steps: of the run.
    """

    coef: float
    control: Callable[..., Coefficient] = fixed
    steps: int = 1


class MovingTerms:
    """Args:
    terms: by name; a name without a term weighs 0.
    """

    def __init__(self, terms: Mapping[str, Term | None]) -> None:
        self._terms = {name: term for name, term in terms.items() if term is not None}
        self._kept = {name: term.coef for name, term in self._terms.items()}
        self._applied = dict(self._kept)

    def weight(self, name: str) -> float:
        """Of the term in the step under way."""
        return self._applied.get(name, 0.0)

    def move(self, measured: Mapping[str, float], *, rollouts: int, step: int) -> None:
        """After a step: what the terms came to, by name, nats; ``step`` are done."""
        for name, term in self._terms.items():
            if name not in measured:
                continue
            inputs = {
                "kept": self._kept[name],
                "measured": measured[name],
                "rollouts": rollouts,
                "step": step,
                "steps": term.steps,
            }
            moved = call_row(term.control, inputs)
            self._kept[name], self._applied[name] = moved.kept, moved.applied

    def state(self) -> dict[str, list[float]]:
        return {name: [self._kept[name], self._applied[name]] for name in self._terms}

    def restore(self, state: Mapping[str, list[float]]) -> None:
        for name, (kept, applied) in state.items():
            self._kept[name], self._applied[name] = kept, applied
