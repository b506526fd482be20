"""Samples to microbatches: samples are dealt evenly by what they cost, each rank lays its own out in rows, and every
rank gets as many microbatches.

Legend: T tokens of one sample, R rows, L tokens of a row. The result depends on the arguments alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlsys.batch.balance import balanced
from rlsys.batch.cost import BY_TOKENS, TokenCost
from rlsys.batch.rows import Layout, Row, lay_out
from rlsys.batch.tensors import Batch, Microbatch, RankBatch, RankPart, Segment, TeacherTensors
from rlsys.errors import ConfigError
from rlsys.records import Sample, Version, steps_of

_EMPTY_LENGTH = 2  # tokens of a row that only keeps ranks in step; next-token prediction needs two


def pack(
    samples: Sequence[Sample],
    *,
    ranks: int,
    steps_per_batch: int,
    tokens_per_microbatch: int,
    pad_token_id: int,
    version: Version,
    cost: TokenCost = BY_TOKENS,
) -> Batch:
    """Cut ``samples`` into ``steps_per_batch`` disjoint parts of near equal size (fewer where there are fewer samples),
    deal each to ``ranks``, and lay out what a rank has in rows.

    Args:
        version: the version that is trained.
        cost: of the model that is trained.

    Raises:
        ConfigError: a sample is longer than ``tokens_per_microbatch``.
        ValueError: there is no sample, or one carries no weight, or weight on its first token (nothing predicts it), or
            a teacher scored some samples only.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    for sample in samples:
        _check(sample, tokens_per_microbatch)
    if len({sample.teacher is None for sample in samples}) > 1:
        raise ValueError("the teacher scored some samples of the batch and others not")
    tensors = _Tensors(samples, pad_token_id, version)
    lengths = [len(sample.token_ids_T) for sample in samples]
    cuts = [
        _dealt([int(index) for index in indices], lengths, ranks, tokens_per_microbatch, cost)
        for indices in np.array_split(np.arange(len(samples)), steps_per_batch)
        if len(indices)
    ]
    parts = [[tensors.part(rows, cut) for rows in _in_step(cut)] for cut in cuts]
    return Batch(
        ranks=tuple(
            RankBatch(
                version=version,
                parts=tuple(part[rank] for part in parts),
                num_tokens=sum(lengths),
                num_samples=len(samples),
                balance=_balance(cuts),
            )
            for rank in range(ranks)
        )
    )


def _dealt(indices: Sequence[int], lengths: Sequence[int], ranks: int, budget: int, cost: TokenCost) -> list[Layout]:
    """Of one optimizer step of the samples ``indices``: what each rank has."""
    layouts = []
    for own in balanced([cost.of(lengths[index]) for index in indices], ranks):
        of_rank = [indices[position] for position in own]
        found = lay_out([lengths[index] for index in of_rank], budget, cost)
        rows = tuple(
            tuple([of_rank[place] for place in row] for row in microbatch) for microbatch in found.microbatches
        )
        layouts.append(Layout(microbatches=rows, cost=found.cost))
    return layouts


def _in_step(layouts: Sequence[Layout]) -> list[list[Sequence[Row]]]:
    """Of each rank its microbatches, empty ones behind them where another rank has more."""
    most = max(len(layout.microbatches) for layout in layouts)
    return [[*layout.microbatches, *[()] * (most - len(layout.microbatches))] for layout in layouts]


def _balance(cuts: Sequence[Sequence[Layout]]) -> float:
    """Ranks wait for the dearest of them in every optimizer step."""
    costs = [[layout.cost for layout in cut] for cut in cuts]
    return sum(sum(of_ranks) / len(of_ranks) for of_ranks in costs) / sum(max(of_ranks) for of_ranks in costs)


class _Tensors:
    """The samples of a batch, and how they become tensors."""

    def __init__(self, samples: Sequence[Sample], pad_token_id: int, version: Version) -> None:
        self._samples = samples
        self._pad_token_id = pad_token_id
        self._version = version
        self._keys = [_key(sample.rollout_id, version) for sample in samples]
        prompts = [sample.rollout_id.rpartition("/")[0] for sample in samples]
        weighted = [int(np.count_nonzero(sample.weight_mask_T)) for sample in samples]
        tokens_of: Counter[str] = Counter()
        for prompt, number in zip(prompts, weighted, strict=True):
            tokens_of[prompt] += number
        self._prompt_tokens = [float(tokens_of[prompt]) for prompt in prompts]
        teacher = samples[0].teacher
        self._num_candidates = None if teacher is None else teacher.candidate_ids_TK.shape[1]

    def part(self, microbatches: Sequence[Sequence[Row]], cut: Sequence[Layout]) -> RankPart:
        """One rank's share of an optimizer step that all of ``cut`` is of."""
        of_step = [index for layout in cut for rows in layout.microbatches for row in rows for index in row]
        return RankPart(
            microbatches=tuple(self.microbatch(rows) for rows in microbatches),
            num_weighted_tokens=sum(int(np.count_nonzero(self._samples[index].weight_mask_T)) for index in of_step),
        )

    def microbatch(self, rows: Sequence[Row]) -> Microbatch:
        """The tensors of ``rows``; one short row without weight where there are none."""
        shape = (max(1, len(rows)), max((self._num_tokens(row) for row in rows), default=_EMPTY_LENGTH))
        position_ids = np.broadcast_to(np.arange(shape[1]), shape).copy()
        segments = []
        for row, indices in enumerate(rows):
            offset = 0
            for index in indices:
                length = len(self._samples[index].token_ids_T)
                position_ids[row, offset:] = np.arange(shape[1] - offset)  # the last sample's go on over the padding
                segments.append(Segment(sample=index, row=row, offset=offset, length=length))
                offset += length
        return Microbatch(
            token_ids=self._laid(shape, np.int64, "token_ids_T", segments, fill=self._pad_token_id),
            position_ids=torch.from_numpy(position_ids),
            weight_mask=self._laid(shape, np.bool_, "weight_mask_T", segments),
            behaviour_logprobs=self._laid(shape, np.float32, "behaviour_logprobs_T", segments),
            advantages=self._laid(shape, np.float32, "advantages_T", segments),
            rewards=self._laid(shape, np.float32, "rewards_T", segments),
            on_policy_mask=self._on_policy_mask(shape, segments),
            keys_S=torch.tensor([self._keys[segment.sample] for segment in segments] or [0]),
            prompt_tokens_S=torch.tensor([self._prompt_tokens[segment.sample] for segment in segments] or [0.0]),
            greedy_rewards_S=torch.tensor([self._samples[s.sample].greedy_reward for s in segments] or [0.0]),
            correct_S=torch.tensor([self._samples[segment.sample].is_correct for segment in segments] or [False]),
            teacher=self._teacher(shape, segments),
            segments=tuple(segments),
        )

    def _laid(
        self, shape: tuple[int, ...], dtype: type, name: str, segments: Sequence[Segment], fill: float = 0
    ) -> torch.Tensor:
        """What the samples have under ``name``, at their places; ``fill`` elsewhere."""
        values = {segment.sample: getattr(self._samples[segment.sample], name) for segment in segments}
        return _laid(shape, dtype, values, segments, fill)

    def _on_policy_mask(self, shape: tuple[int, int], segments: Sequence[Segment]) -> torch.Tensor:
        samples = {segment.sample: self._samples[segment.sample] for segment in segments}
        masks = {
            index: sample.weight_mask_T & (steps_of(sample.versions_T) == self._version.step)
            for index, sample in samples.items()
        }
        return _laid(shape, np.bool_, masks, segments)

    def _teacher(self, shape: tuple[int, int], segments: Sequence[Segment]) -> TeacherTensors | None:
        if self._num_candidates is None:
            return None
        scores = {segment.sample: self._samples[segment.sample].teacher for segment in segments}
        known = {index: score for index, score in scores.items() if score is not None}
        wide = (*shape, self._num_candidates)
        return TeacherTensors(
            logprobs=_laid(shape, np.float32, {i: s.logprobs_T for i, s in known.items()}, segments),
            candidate_ids=_laid(wide, np.int64, {i: s.candidate_ids_TK for i, s in known.items()}, segments),
            candidate_logprobs=_laid(
                wide, np.float32, {i: s.candidate_logprobs_TK for i, s in known.items()}, segments
            ),
        )

    def _num_tokens(self, row: Row) -> int:
        return sum(len(self._samples[index].token_ids_T) for index in row)


def _laid(
    shape: tuple[int, ...],
    dtype: type,
    values: Mapping[int, NDArray[Any]],
    segments: Sequence[Segment],
    fill: float = 0,
) -> torch.Tensor:
    """[R, L] or [R, L, K], the values of each sample (by its index) at its place."""
    laid: NDArray[Any] = np.full(shape, fill, dtype=dtype)
    for segment in segments:
        laid[segment.row, segment.offset : segment.offset + segment.length] = values[segment.sample]
    return torch.from_numpy(laid)


def _key(rollout_id: str, version: Version) -> int:
    """63 bits, the same in every process; another one at every step."""
    digest = blake2b(f"{version}/{rollout_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _check(sample: Sample, tokens_per_microbatch: int) -> None:
    num_tokens = len(sample.token_ids_T)
    if num_tokens > tokens_per_microbatch:
        raise ConfigError(
            "train.tokens_per_microbatch",
            f"{tokens_per_microbatch}, but {sample.rollout_id} has {num_tokens} tokens",
            "room for the longest prompt and its answer",
            "Raise train.tokens_per_microbatch, or lower rollout.max_tokens.",
        )
    if not sample.weight_mask_T.any():
        raise ValueError(f"{sample.rollout_id} has no weighted token: it is no sample")
    if sample.weight_mask_T[0]:
        raise ValueError(f"the first token of {sample.rollout_id} carries weight, but nothing predicts it")
