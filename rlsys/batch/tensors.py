"""What the learner is handed: a batch in tensors, cut into optimizer steps, ranks and microbatches.

Legend: R rows, L tokens of a row. Every tensor [R, L] is aligned to the token it describes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlsys.records import Version


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Where a sample lies in a microbatch: tokens ``[row, offset : offset + length]`` are sample ``sample`` of those
    handed to ``pack``."""

    sample: int
    row: int
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherTensors:
    """What the teacher says of a microbatch, nats; 0 where nothing stands. K candidates at a place.

    Attributes:
        logprobs: float32 [R, L].
        candidate_ids: int64 [R, L, K].
        candidate_logprobs: float32 [R, L, K].
    """

    logprobs: Tensor
    candidate_ids: Tensor
    candidate_logprobs: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """Rows of samples for one forward and backward pass. Several samples may share a row; positions restart at each.

    Padding stands at the end of a row, carries no weight and continues the positions of the row's last sample: a row
    with one sample has plain ascending positions, and so plain causal attention.

    Attributes:
        token_ids: int64 [R, L].
        position_ids: int64 [R, L], 0 at the first token of each sample.
        weight_mask: bool [R, L], tokens that carry weight in the gradient.
        behaviour_logprobs: float32 [R, L], nats.
        advantages: float32 [R, L].
        rewards: float32 [R, L], on the tokens that earned them.
        on_policy_mask: bool [R, L], weighted tokens sampled by the version that is trained.
        keys_S: int64 [S], a key of each sample's rollout at this step, in the order of the positions that are 0.
        prompt_tokens_S: float32 [S], weighted tokens of all samples of its prompt in the batch.
        greedy_rewards_S: float32 [S].
        correct_S: bool [S], samples whose answer is right.
        teacher: None where the run has no teacher.
        segments: the samples in it; none in a microbatch that only keeps ranks in step, and has one empty sequence.
    """

    token_ids: Tensor
    position_ids: Tensor
    weight_mask: Tensor
    behaviour_logprobs: Tensor
    advantages: Tensor
    rewards: Tensor
    on_policy_mask: Tensor
    keys_S: Tensor
    prompt_tokens_S: Tensor
    greedy_rewards_S: Tensor
    correct_S: Tensor
    teacher: TeacherTensors | None
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        shape = self.token_ids.shape
        for tensor in (
            self.position_ids,
            self.weight_mask,
            self.behaviour_logprobs,
            self.advantages,
            self.rewards,
            self.on_policy_mask,
        ):
            if tensor.shape != shape or len(shape) != 2:
                raise ValueError(f"microbatch tensors must share one shape [R, L], got {shape} and {tensor.shape}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPart:
    """One rank's share of one optimizer step.

    Attributes:
        microbatches: as many as on every other rank (collectives would not match otherwise).
        num_weighted_tokens: over all ranks; the loss is divided by it.
    """

    microbatches: tuple[Microbatch, ...]
    num_weighted_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RankBatch:
    """One rank's share of a batch.

    Attributes:
        version: the version that is trained (the weights before the first of the steps).
        parts: one per optimizer step, in order.
        num_tokens: tokens of all samples over all ranks and parts, padding excluded.
        num_samples: likewise.
        balance: estimated cost of a rank, the mean over the largest: 1 where no rank waits for another one.
    """

    version: Version
    parts: tuple[RankPart, ...]
    num_tokens: int
    num_samples: int
    balance: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """A packed batch: for each rank its share."""

    ranks: tuple[RankBatch, ...]

    def for_rank(self, rank: int) -> RankBatch:
        """What rank ``rank`` trains; picklable."""
        return self.ranks[rank]
