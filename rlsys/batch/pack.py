"""Samples to microbatches: short samples share rows, rows are dealt evenly, every rank gets as many microbatches.

Legend: T tokens of one sample, R rows, L tokens of a row. The result depends on the arguments alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch

from rlsys.batch.tensors import Batch, Microbatch, RankBatch, RankPart, Segment
from rlsys.errors import ConfigError
from rlsys.records import Sample, Version, steps_of

Row = list[int]  # indices of the samples that share a row, in their order in it

_EMPTY_LENGTH = 2  # tokens of a row that only keeps ranks in step; next-token prediction needs two


def pack(
    samples: Sequence[Sample],
    *,
    ranks: int,
    steps_per_batch: int,
    tokens_per_microbatch: int,
    pad_token_id: int,
    version: Version,
) -> Batch:
    """Cut ``samples`` into ``steps_per_batch`` disjoint parts of near equal size (fewer where there are fewer samples),
    each into rows, and deal the rows to ``ranks``.

    Args:
        version: the version that is trained.

    Raises:
        ConfigError: a sample is longer than ``tokens_per_microbatch``.
        ValueError: there is no sample, or one carries no weight, or weight on its first token (nothing predicts it).
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    for sample in samples:
        _check(sample, tokens_per_microbatch)
    layout = _Layout(samples, tokens_per_microbatch, pad_token_id, version)
    parts = [
        layout.deal([int(index) for index in indices], ranks)
        for indices in np.array_split(np.arange(len(samples)), steps_per_batch)
        if len(indices)
    ]
    num_tokens = sum(len(sample.token_ids_T) for sample in samples)
    return Batch(
        ranks=tuple(
            RankBatch(version=version, parts=tuple(part[rank] for part in parts), num_tokens=num_tokens)
            for rank in range(ranks)
        )
    )


def fill_rows(lengths: Sequence[int], capacity: int) -> list[Row]:
    """First-fit decreasing: rows of at most ``capacity`` tokens, each a list of indices into ``lengths``.

    Longest first, equal lengths in their order, each into the first row with room.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    room = np.zeros(len(lengths), dtype=np.int64)
    rows: list[Row] = []
    for index in order.tolist():
        fitting = room[: len(rows)] >= lengths[index]
        row = int(fitting.argmax()) if fitting.any() else len(rows)
        if row == len(rows):
            rows.append([])
            room[row] = capacity
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


class _Layout:
    """The samples of a batch, and how they become tensors."""

    def __init__(
        self, samples: Sequence[Sample], tokens_per_microbatch: int, pad_token_id: int, version: Version
    ) -> None:
        self._samples = samples
        self._budget = tokens_per_microbatch
        self._pad_token_id = pad_token_id
        self._version = version
        self._keys = [_key(sample.rollout_id, version) for sample in samples]
        prompts = [sample.rollout_id.rpartition("/")[0] for sample in samples]
        weighted = [int(np.count_nonzero(sample.weight_mask_T)) for sample in samples]
        tokens_of: Counter[str] = Counter()
        for prompt, number in zip(prompts, weighted, strict=True):
            tokens_of[prompt] += number
        self._prompt_tokens = [float(tokens_of[prompt]) for prompt in prompts]

    def deal(self, indices: Sequence[int], ranks: int) -> tuple[RankPart, ...]:
        """One optimizer step of the samples ``indices``: each rank's part.

        A row holds as many tokens as the longest sample. Rows go to the ranks in a snake by their tokens, and each
        rank's rows, longest first, into equally many microbatches, so that rows of like length meet.
        """
        lengths = [len(self._samples[index].token_ids_T) for index in indices]
        capacity = max(lengths)
        rows = [[indices[position] for position in row] for row in fill_rows(lengths, capacity)]
        rows.sort(key=self._num_tokens, reverse=True)
        rows_by_rank: list[list[Row]] = [[] for _ in range(ranks)]
        for position, row in enumerate(rows):
            turn, place = divmod(position, ranks)
            rows_by_rank[place if turn % 2 == 0 else ranks - 1 - place].append(row)

        rows_per_microbatch = self._budget // capacity
        num_microbatches = max(-(-len(own) // rows_per_microbatch) for own in rows_by_rank)
        num_weighted_tokens = sum(int(np.count_nonzero(self._samples[index].weight_mask_T)) for index in indices)
        return tuple(
            RankPart(
                microbatches=tuple(
                    self.microbatch([own[position] for position in chunk])
                    for chunk in np.array_split(np.arange(len(own)), num_microbatches)
                ),
                num_weighted_tokens=num_weighted_tokens,
            )
            for own in rows_by_rank
        )

    def microbatch(self, rows: Sequence[Row]) -> Microbatch:
        """The tensors of ``rows``; one short row without weight where there are none."""
        shape = (max(1, len(rows)), max((self._num_tokens(row) for row in rows), default=_EMPTY_LENGTH))
        token_ids = np.full(shape, self._pad_token_id, dtype=np.int64)
        position_ids = np.broadcast_to(np.arange(shape[1]), shape).copy()
        weight_mask = np.zeros(shape, dtype=np.bool_)
        on_policy_mask = np.zeros(shape, dtype=np.bool_)
        behaviour_logprobs = np.zeros(shape, dtype=np.float32)
        advantages = np.zeros(shape, dtype=np.float32)
        segments = []
        for row, indices in enumerate(rows):
            offset = 0
            for index in indices:
                sample = self._samples[index]
                length = len(sample.token_ids_T)
                here = (row, slice(offset, offset + length))
                token_ids[here] = sample.token_ids_T
                position_ids[row, offset:] = np.arange(shape[1] - offset)  # the last sample's go on over the padding
                weight_mask[here] = sample.weight_mask_T
                on_policy_mask[here] = sample.weight_mask_T & (steps_of(sample.versions_T) == self._version.step)
                behaviour_logprobs[here] = sample.behaviour_logprobs_T
                advantages[here] = sample.advantages_T
                segments.append(Segment(sample=index, row=row, offset=offset, length=length))
                offset += length
        return Microbatch(
            token_ids=torch.from_numpy(token_ids),
            position_ids=torch.from_numpy(position_ids),
            weight_mask=torch.from_numpy(weight_mask),
            behaviour_logprobs=torch.from_numpy(behaviour_logprobs),
            advantages=torch.from_numpy(advantages),
            on_policy_mask=torch.from_numpy(on_policy_mask),
            keys_S=torch.tensor([self._keys[segment.sample] for segment in segments] or [0]),
            prompt_tokens_S=torch.tensor([self._prompt_tokens[segment.sample] for segment in segments] or [0.0]),
            segments=tuple(segments),
        )

    def _num_tokens(self, row: Row) -> int:
        return sum(len(self._samples[index].token_ids_T) for index in row)


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
