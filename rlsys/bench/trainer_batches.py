"""What the trainer's bench trains: sequences of skewed lengths, packed as in a run or padded; and rows of one length.

Legend: T tokens of one sample, R rows, L tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GenerationConfig, PreTrainedModel

from rlsys.batch.cost import BY_TOKENS, TokenCost
from rlsys.batch.pack import pack
from rlsys.batch.tensors import Batch, Microbatch, RankBatch, RankPart
from rlsys.bench.smollm2_shape import make_random_smollm2
from rlsys.models.folder import write_folder
from rlsys.models.tiny.model import make_random_model, make_tokenizer
from rlsys.records import NOT_SAMPLED, Sample, Version

SKEW = 1.5  # a length is longest x quantile ** SKEW, so that the mean is 1 / (SKEW + 1) = 0.4 of the longest
PROMPT_SHARE = 0.25  # of a sequence: tokens without weight
VERSION = Version(incarnation=0, step=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What is measured, and how often.

    Attributes:
        is_tiny: the embedded model's shape; else SmolLM2-135M's.
        sequences, longest: of the skewed batch; tokens of its longest sequence.
        tokens_per_microbatch: of the packed and of the padded form.
        rows, row_tokens: of the batch of equally long sequences.
        repeats: of everything that is compared, interleaved; the median counts.
    """

    is_tiny: bool
    sequences: int
    longest: int
    tokens_per_microbatch: int
    rows: int
    row_tokens: int
    repeats: int


def make_model(folder: Path, sizes: Sizes) -> None:
    """Write the random model that every process reads."""
    tokenizer = make_tokenizer()
    model: PreTrainedModel = make_random_model(tokenizer) if sizes.is_tiny else make_random_smollm2()
    write_folder(folder, model, model.config, GenerationConfig(eos_token_id=1), tokenizer)


def skewed_lengths(sizes: Sizes) -> list[int]:
    """In a random order; the longest is there, and the mean is close to 0.4 of it."""
    quantiles = (np.arange(sizes.sequences) + 0.5) / sizes.sequences
    lengths = np.maximum(2, np.round(sizes.longest * quantiles**SKEW)).astype(int)
    lengths[-1] = sizes.longest
    return np.random.default_rng(0).permutation(lengths).tolist()


def make_samples(lengths: Sequence[int], vocab_size: int) -> list[Sample]:
    """Random tokens, sampled by the very policy that is trained."""
    return [_sample(index, length, vocab_size) for index, length in enumerate(lengths)]


def packed(samples: Sequence[Sample], sizes: Sizes, cost: TokenCost, ranks: int = 1) -> Batch:
    return pack(
        samples,
        ranks=ranks,
        steps_per_batch=1,
        tokens_per_microbatch=sizes.tokens_per_microbatch,
        pad_token_id=0,
        version=VERSION,
        cost=cost,
    )


def padded(samples: Sequence[Sample], sizes: Sizes) -> RankBatch:
    """The same as rows of one sample each, all as long as the longest, in the order in which they come."""
    alone = [packed([sample], sizes, BY_TOKENS).for_rank(0).parts[0].microbatches[0] for sample in samples]
    rows = sizes.tokens_per_microbatch // sizes.longest
    microbatches = tuple(_stacked(alone[first : first + rows], sizes.longest) for first in range(0, len(alone), rows))
    part = RankPart(
        microbatches=microbatches, num_weighted_tokens=sum(int(sample.weight_mask_T.sum()) for sample in samples)
    )
    num_tokens = sum(len(sample.token_ids_T) for sample in samples)
    return RankBatch(version=VERSION, parts=(part,), num_tokens=num_tokens, num_samples=len(samples))


def fill(batch: RankBatch) -> float:
    """Share of the places in its microbatches that hold a token of a sample."""
    places = sum(microbatch.token_ids.numel() for part in batch.parts for microbatch in part.microbatches)
    return batch.num_tokens / places


def _stacked(alone: Sequence[Microbatch], length: int) -> Microbatch:
    def rows(name: str) -> torch.Tensor:
        return torch.cat([F.pad(getattr(mb, name), (0, length - mb.token_ids.shape[1])) for mb in alone])

    names = ("token_ids", "weight_mask", "behaviour_logprobs", "advantages", "rewards", "on_policy_mask")
    of_samples = ("keys_S", "prompt_tokens_S", "greedy_rewards_S", "correct_S")
    return Microbatch(
        **{name: rows(name) for name in names},
        **{name: torch.cat([getattr(mb, name) for mb in alone]) for name in of_samples},
        position_ids=torch.arange(length).repeat(len(alone), 1),
        teacher=None,
        segments=(),
    )


def _sample(index: int, length: int, vocab_size: int) -> Sample:
    rng = np.random.default_rng([index, length])
    weighted_T = np.arange(length) >= max(1, int(PROMPT_SHARE * length))
    return Sample(
        rollout_id=f"bench:{index}#0/0",
        token_ids_T=rng.integers(0, vocab_size, length).astype(np.int32),
        weight_mask_T=weighted_T,
        behaviour_logprobs_T=np.where(weighted_T, -math.log(vocab_size), 0.0).astype(np.float32),
        advantages_T=np.where(weighted_T, 1.0 if index % 2 else -1.0, 0.0).astype(np.float32),
        versions_T=np.where(weighted_T, VERSION.code, NOT_SAMPLED).astype(np.int64),
        rewards_T=np.zeros(length, dtype=np.float32),
        greedy_reward=0.0,
        is_correct=False,
        teacher=None,
    )
