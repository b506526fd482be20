"""A random number for each token that depends on the token alone, not on the microbatch that it is packed into.

Legend: T packed tokens, S sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algo.segments import Segments

# SplitMix64 (Steele, Lea and Flood 2014), its constants as signed 64-bit integers
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def token_draws(sequence_keys_S: Tensor, segments: Segments) -> Tensor:
    """Uniform numbers in [0, 1), float64 [T], from each sequence's key and the position in it.

    Args:
        sequence_keys_S: int64 [S], a key of each sequence: of its rollout, and of the step if it is to change.
    """
    assert sequence_keys_S.dtype == torch.int64 and sequence_keys_S.shape == segments.starts_S.shape, "keys"
    positions_T = torch.arange(segments.num_tokens, device=sequence_keys_S.device)
    within_T = positions_T - segments.spread(segments.starts_S)
    mixed_T = _mix(_mix(segments.spread(sequence_keys_S)) + within_T)
    return _shifted(mixed_T, 11).double() * 2.0**-53


def _mix(values: Tensor) -> Tensor:
    """SplitMix64's output function; int64 arithmetic wraps around, as it must."""
    values = values + _STEP
    values = (values ^ _shifted(values, 30)) * _FIRST
    values = (values ^ _shifted(values, 27)) * _SECOND
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's own keeps the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
