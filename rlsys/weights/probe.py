"""Right bytes are not yet right weights: an engine proves what it serves by the log-probabilities of fixed tokens.

Legend of dimension suffixes: P probe sequences, T tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlsys.errors import WeightsRefused
from rlsys.records import Probe

NUM_SEQUENCES = 2
NUM_TOKENS = 48  # a short context and a longer one in every sequence, at the price of one small prefill

# Mean absolute difference in nats that is still arithmetic noise, by the engine's dtype.
# float32: rounding gives about 1e-7 (tiny models) to 1e-5 (135M parameters); 1e-4 is the bound stated for engine and
#   learner everywhere in rlsys.
# bfloat16: 8 bits of mantissa in weights and activations of engine and learner give 0.07 to 0.09 on a 135M model
#   that is trained in bfloat16, whatever is served; 0.2 leaves a factor of two. So in bfloat16 a probe tells apart
#   only versions that differ by more than 0.2 nats a token.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.2}


def probe_sequences(
    vocab_size: int, seed: int, *, num: int = NUM_SEQUENCES, length: int = NUM_TOKENS
) -> tuple[NDArray[np.int32], ...]:
    """Fixed token sequences, the same for the same arguments on every machine.

    Returns:
        ``num`` arrays, int32 [T], T = ``length``, tokens below ``vocab_size``.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    tokens_PT = generator.integers(0, vocab_size, size=(num, length), dtype=np.int32)
    return tuple(tokens_PT)


def check_probe(got: Sequence[NDArray[np.float32]], probe: Probe, previous: Probe | None, tolerance: float) -> float:
    """Compare what an engine answered with what the learner computed.

    Args:
        got: P arrays, float32 [T], nats; index 0 of each is ignored, since nothing predicts the first token.
        previous: the probe under the version before, None for the first one.
        tolerance: mean absolute difference that is still noise (``TOLERANCE``).

    Returns:
        Mean absolute difference to ``probe``, nats.

    Raises:
        WeightsRefused: the difference is above ``tolerance`` (or not finite), or the two versions differ by more than
            ``tolerance`` and the answer lies nearer to the previous one.
    """
    difference = _mean_difference(got, probe.logprobs)
    if not difference <= tolerance:  # so written that NaN is refused
        raise WeightsRefused(
            f"probe: log-probabilities of the fixed tokens differ from the learner's by {difference:.3g} nats on "
            f"average, wanted at most {tolerance:.3g}"
        )
    if previous is not None and _mean_difference(previous.logprobs, probe.logprobs) > tolerance:
        difference_to_previous = _mean_difference(got, previous.logprobs)
        if difference_to_previous < difference:
            raise WeightsRefused(
                f"probe: the engine answers as the version before (difference {difference_to_previous:.3g} nats), "
                f"wanted the new one (difference {difference:.3g})"
            )
    return difference


def _mean_difference(one: Sequence[NDArray[np.float32]], other: Sequence[NDArray[np.float32]]) -> float:
    if [len(logprobs_T) for logprobs_T in one] != [len(logprobs_T) for logprobs_T in other]:
        raise WeightsRefused(
            f"probe: got sequences of {[len(logprobs_T) for logprobs_T in one]} tokens, "
            f"wanted {[len(logprobs_T) for logprobs_T in other]}"
        )
    differences = [
        np.abs(one_T[1:].astype(np.float64) - other_T[1:]) for one_T, other_T in zip(one, other, strict=True)
    ]
    return float(np.concatenate(differences).mean())
