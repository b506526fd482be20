"""The probe: right answers pass, old or wrong or unordered ones are refused."""

from __future__ import annotations

import numpy as np
import pytest

from rlsys.errors import WeightsRefused
from rlsys.records import Probe
from rlsys.weights.probe import TOLERANCE, check_probe, probe_sequences

TOKENS = probe_sequences(100, seed=3)


def _probe(level: float) -> Probe:
    """Every predicted token has log-probability ``level``."""
    return Probe(token_ids=TOKENS, logprobs=tuple(_answers(level)))


def _answers(level: float) -> list[np.ndarray]:
    return [np.concatenate([[0.0], np.full(len(tokens) - 1, level)]).astype(np.float32) for tokens in TOKENS]


def test_sequences_are_fixed_by_seed_and_within_the_vocabulary():
    again = probe_sequences(100, seed=3)
    assert [tokens.tolist() for tokens in again] == [tokens.tolist() for tokens in TOKENS]
    assert [tokens.tolist() for tokens in probe_sequences(100, seed=4)] != [tokens.tolist() for tokens in TOKENS]
    assert all(tokens.dtype == np.int32 and tokens.shape == (48,) for tokens in TOKENS)
    assert all(tokens.min() >= 0 and tokens.max() < 100 for tokens in TOKENS)


def test_difference_is_the_mean_over_predicted_tokens():
    got = _answers(-2.0)
    got[0][5] -= 0.0094  # one of 2 x 47 predicted tokens
    got[1][0] = 99.0  # nothing predicts the first token, so its number means nothing
    assert check_probe(got, _probe(-2.0), None, TOLERANCE["float32"]) == pytest.approx(1e-4, rel=1e-2)
    got[0][5] -= 0.0002
    with pytest.raises(WeightsRefused, match="differ from the learner's"):
        check_probe(got, _probe(-2.0), None, TOLERANCE["float32"])


def test_the_previous_versions_answer_is_refused_even_within_the_tolerance():
    new, old = _probe(-2.0), _probe(-2.3)
    assert check_probe(_answers(-2.0), new, old, 0.1) == 0.0
    with pytest.raises(WeightsRefused, match="as the version before"):
        check_probe(_answers(-2.16), new, old, 0.2)  # 0.16 from the new one, 0.14 from the old one


def test_versions_closer_than_the_tolerance_are_not_told_apart():
    assert check_probe(_answers(-2.05), _probe(-2.0), _probe(-2.05), 0.1) == pytest.approx(0.05, rel=1e-5)


def test_numbers_that_are_no_numbers_and_missing_tokens_are_refused():
    with pytest.raises(WeightsRefused):
        check_probe(_answers(float("nan")), _probe(-2.0), None, 0.1)
    with pytest.raises(WeightsRefused, match="wanted \\[48, 48\\]"):
        check_probe(_answers(-2.0)[:1], _probe(-2.0), None, 0.1)
