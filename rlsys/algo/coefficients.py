"""COEFFICIENTS: how the weight of a term of the loss (divergence, entropy) moves from step to step. Plain numbers.

A row takes the coefficient kept so far and what was measured in the step, and returns the next one.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlsys.algo.rows import RowFacts, row, table


@dataclass(frozen=True, kw_only=True, slots=True)
class Coefficient:
    """A coefficient after a step.

    Attributes:
        kept: what the next update starts from.
        applied: what the term of the next step is multiplied by.
    """

    kept: float
    applied: float


@row(
    RowFacts(
        source="a constant",
        peers={"verl": "kl_ctrl.type fixed, kl_coef 0.001", "TRL": "beta", "OpenRLHF": "init_coef 0.01"},
    )
)
def fixed(kept: float) -> Coefficient:
    """The same in every step, whatever was measured."""
    return Coefficient(kept=kept, applied=kept)


@row(
    RowFacts(
        source="Ziegler et al. 2019, arXiv:1909.08593",
        peers={
            "verl": "kl_ctrl.type adaptive, target_kl 0.1 nats a token, horizon 10,000",
            "OpenRLHF": "kl_target, kl_horizon 10,000",
        },
    )
)
def adaptive_kl(
    kept: float, measured: float, rollouts: int, *, target: float = 6.0, horizon: float = 10_000.0
) -> Coefficient:
    """kept * (1 + clip(measured / target - 1, -0.2, 0.2) * rollouts / horizon).

    Args:
        target: nats a rollout.
        horizon: rollouts.
    """
    assert target > 0.0 and horizon > 0.0, f"target={target}, horizon={horizon}"
    error = min(max(measured / target - 1.0, -0.2), 0.2)
    next_coefficient = kept * (1.0 + error * rollouts / horizon)
    return Coefficient(kept=next_coefficient, applied=next_coefficient)


@row(RowFacts(source="PipelineRL, arXiv:2509.19128", peers={"PipelineRL": "its KL coefficient falls so"}))
def linear_decay(kept: float, step: int, steps: int, *, last: float = 0.0) -> Coefficient:
    """kept + (last - kept) * step / steps, kept being the first.

    Behind ``steps`` it stays ``last``.
    """
    assert steps > 0 and step >= 0, f"step={step}, steps={steps}"
    return Coefficient(kept=kept, applied=kept + (last - kept) * min(1.0, step / steps))


@row(
    RowFacts(
        source="Skywork-OR1, arXiv:2505.22312",
        peers={"TRL": "use_adaptive_entropy, entropy_target 0.2, entropy_coef_delta 0.005"},
    )
)
def adaptive_entropy(
    kept: float,
    measured: float,
    *,
    target: float = 0.2,
    delta: float = 0.005,
    lowest: float = 0.0,
    highest: float = 1.0,
) -> Coefficient:
    """delta up where the entropy is at most ``target``, else delta down, within bounds; applied only in the first case.

    Args:
        target: mean entropy of the step's tokens, nats.
    """
    assert lowest <= highest and delta >= 0.0, f"lowest={lowest}, highest={highest}, delta={delta}"
    is_low = measured <= target
    next_coefficient = min(kept + delta, highest) if is_low else max(kept - delta, lowest)
    return Coefficient(kept=next_coefficient, applied=next_coefficient if is_low else 0.0)


COEFFICIENTS = table(fixed, adaptive_kl, linear_decay, adaptive_entropy)
