"""What the loops need to know of the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from rlsys.buffer.batching import BatchRule
from rlsys.rollout.play import PlaySpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Settings of one run.

    Attributes:
        steps: batches to train.
        batch: which groups make one.
        max_staleness, age_policy, oversample: as in the config.
        slots: rollouts that an engine has in hand at once; some of them may still wait inside it.
        replicas: engines that are wanted; None: as many as there is room for.
        spec: sampling in training.
        min_compared: rewards that a group needs so that its rollouts can learn.
        checkpoint_every_steps: 0 means after the last step and at a stop only.
        eval_every_steps: 0 means before and after only.
        pass_samples, pass_at: pass@k before and after; 0 samples switch it off.
        correct_at: reward from which an answer is correct.
        rollouts_logged: sampled rollouts kept per step.
        start_timeout_s: deadline for an engine to come up, seconds.
        play_timeout_s, score_timeout_s, step_timeout_s: deadlines, seconds; the last one of a checkpoint too.
        stall_s: longest time in which not a single rollout gets on, seconds.
        max_retries: how often one rollout is played again whose engine was lost.
        update_share: of the engines that take over new weights at a time.
        recomputes: whether requests in flight have their KV computed again under new weights.
        engine_cores, trainer_cores: cores (GPUs where the run is on GPUs) of one engine, and of all learner ranks.
    """

    steps: int
    batch: BatchRule
    max_staleness: int
    age_policy: str
    oversample: float
    slots: int
    replicas: int | None
    spec: PlaySpec
    min_compared: int
    checkpoint_every_steps: int
    eval_every_steps: int
    pass_samples: int
    pass_at: tuple[int, ...]
    correct_at: float
    rollouts_logged: int
    start_timeout_s: float
    play_timeout_s: float
    score_timeout_s: float
    step_timeout_s: float
    stall_s: float
    max_retries: int
    update_share: float
    recomputes: bool
    engine_cores: float
    trainer_cores: float

    @property
    def batch_members(self) -> int:
        """Rollouts that are played for a batch, greedy ones included."""
        return self.batch.prompts * self.spec.num_members
