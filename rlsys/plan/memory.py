"""How much memory a learner process takes at its peak, and whether the machine has it.

The peak is reached in the backward pass of a full microbatch, or where the optimizer steps. What stays is counted from
the number of parameters; what a microbatch leaves behind until its backward pass, from the shape of the model. The
prediction is right within ``FACTOR``, which a test holds against real steps.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from rlsys.actors.algorithm import needs_of
from rlsys.algo.rows import Need
from rlsys.config.schema import Config, TrainSection
from rlsys.errors import ConfigError
from rlsys.models.shape import ModelShape, shape_from
from rlsys.plan.space import MOMENTS_BYTES, count_parameters, in_units, is_cluster_named
from rlsys.plan.tensor_parallel import config_of

FACTOR = 1.35  # measured peaks lie between the prediction over this and the prediction times this
PROCESS_BYTES = 340 << 20  # Python, torch, transformers, DeepSpeed, with nothing loaded
HEAP_SLACK = 1.3  # what allocators hold over what is in use, where thousands of tensors come and go
LORA_RANK = 8  # peft's default
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
# Optimizers that keep less than Adam's two moments
MOMENTS_OF = {"sgd": 0, "adagrad": 4, "lion": 4}
BLOCKS_BYTES = 64 << 20  # of the head's log-probabilities, whatever the vocabulary
BUCKET_BYTES = 4 * 50_000_000  # of a reduction over ranks, which reads from one and fills another


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnerMemory:
    """Bytes of one learner process at its peak, by what takes them."""

    process: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """What the learner takes, and what is there.

    Attributes:
        processes: that share ``memory_bytes``: all of them on CPU, one on a GPU.
        memory_bytes: None where another machine, or a GPU that is not here, will hold them.
    """

    learner: LearnerMemory
    processes: int
    memory_bytes: int | None


def check_memory(config: Config, sequence: int) -> MemoryPlan:
    """Compare what the learner takes with what there is. Loads nothing.

    Args:
        sequence: tokens of the longest prompt with the longest answer.

    Raises:
        ConfigError: it cannot fit, even if the prediction is too high by ``FACTOR``.
    """
    on_gpu = config.train.gpus_per_rank > 0
    plan = MemoryPlan(
        learner=_of_config(config, config.train, sequence),
        processes=1 if on_gpu else config.train.processes,
        memory_bytes=None if is_cluster_named(config) else _gpu_bytes() if on_gpu else _ram_bytes(),
    )
    wanted = plan.learner.total * plan.processes
    if plan.memory_bytes is None or wanted <= FACTOR * plan.memory_bytes:
        return plan
    key, best = _what_helps(config, sequence)
    raise ConfigError(
        "memory of the learner",
        got=f"{in_units(plan.memory_bytes)} of {'the GPU' if on_gpu else 'this machine'}",
        wanted=f"about {in_units(wanted)}: {plan.processes} x {in_units(plan.learner.total)} at the peak",
        remedy=f"{key} helps most (then about {in_units(best * plan.processes)}), or choose a smaller model",
    )


def predict(num_parameters: int, shape: ModelShape, train: TrainSection, *, tokens: int, longest: int) -> LearnerMemory:
    """Of one process that trains one model.

    Args:
        tokens: of a full microbatch.
        longest: tokens of its longest row.
    """
    is_half = train.dtype == "bfloat16"
    value = 2 if is_half else 4  # bytes of a weight, a gradient and most activations
    parts, shares = train.tensor_parallel, train.ranks
    sharded = {stage: shares if train.zero_stage >= stage else 1 for stage in (1, 2, 3)}
    own = num_parameters // parts
    trained = own if train.lora is None else adapter_parameters(shape, train.lora) // parts
    copies = 4 if is_half or train.zero_stage > 0 else 0  # float32 masters
    moments = MOMENTS_OF.get(train.optimizer.name, MOMENTS_BYTES)
    offloaded = train.offload if train.gpus_per_rank > 0 else "none"  # from memory into the very same on CPU ranks
    gradients = value * trained // sharded[2]
    # where the optimizer steps the gradients are there in float32 too; what activations had is seldom given back before
    stepping = copies * trained // sharded[1]
    activations = _activations(shape, train, tokens, longest, value) // (parts * train.sequence_parallel)
    head = value * shape.vocab_size * shape.width // parts if train.lora is None else 0  # its gradient, beside the sum
    return LearnerMemory(
        process=PROCESS_BYTES,
        weights=0 if offloaded == "optimizer+params" else value * own // sharded[3],
        gradients=gradients,
        optimizer=0 if offloaded != "none" else (copies + moments) * trained // sharded[1],
        activations=int(HEAP_SLACK * activations) + head + BLOCKS_BYTES,
        buffers=stepping + _buffers(shape, train, trained, value),
    )


def adapter_parameters(shape: ModelShape, lora: dict[str, Any]) -> int:
    """Of low-rank adapters at every linear layer but the head."""
    queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    attention = 2 * (shape.width + queries) + 2 * (shape.width + keys)
    return int(lora.get("r", LORA_RANK)) * shape.layers * (attention + 3 * (shape.width + shape.mlp_width))


def _activations(shape: ModelShape, train: TrainSection, tokens: int, longest: int, value: int) -> int:
    """What the forward pass keeps, and what the backward pass of one layer takes beside it.

    A layer keeps: the residual stream twice, what each of two norms multiplies and gives; queries, keys and values for
    every head, what attention gives, and that in the order of the next layer; four vectors of its feed-forward part.
    Adapters give each linear layer a second output.
    """
    heads, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    layer = 6 * shape.width + 5 * heads + 4 * shape.mlp_width
    if train.lora is not None:
        layer += heads + 2 * keys + 2 * shape.width + 2 * shape.mlp_width
    backward = 2 * shape.width + 3 * shape.mlp_width
    kept = shape.layers * shape.width + layer if train.activation_checkpointing else shape.layers * layer
    mask = tokens * longest * 5  # bool, and float32 where attention reads it
    return tokens * (kept + backward) * value + mask


def _buffers(shape: ModelShape, train: TrainSection, trained: int, value: int) -> int:
    """What moves between ranks: two buckets of gradients, and under ZeRO-3 the weights of two layers."""
    if train.ranks == 1 and train.zero_stage == 0:
        return 0
    gradients = 2 * min(BUCKET_BYTES, value * trained)
    if train.zero_stage < 3:
        return gradients
    largest = max(shape.vocab_size * shape.width, shape.linear_parameters // max(1, shape.layers))
    return gradients + 2 * value * largest


def _of_config(config: Config, train: TrainSection, sequence: int) -> LearnerMemory:
    """Of the policy, with the models around it: a critic is trained beside it, in turns; a reference only answers."""
    path = config.model.path
    rollouts = -(-config.rollouts_per_batch // (train.ranks * train.steps_per_batch))
    tokens = min(train.tokens_per_microbatch, rollouts * sequence)
    number, shape = count_parameters(path), _shape(path)
    policy = predict(number, shape, train, tokens=tokens, longest=sequence)
    weights, gradients, optimizer = policy.weights, policy.gradients, policy.optimizer
    activations = policy.activations
    if Need.CRITIC in needs_of(config):
        of_critic = config.critic.path or path
        critic = predict(
            count_parameters(of_critic),
            _shape(of_critic),
            train.model_copy(update={"lora": None}),
            tokens=tokens,
            longest=sequence,
        )
        weights, gradients = weights + critic.weights, gradients + critic.gradients
        optimizer, activations = optimizer + critic.optimizer, max(activations, critic.activations)
    if config.algo.kl is not None and train.lora is None:
        weights += 4 * number // train.tensor_parallel // (train.ranks if train.zero_stage == 3 else 1)
    return LearnerMemory(
        process=policy.process,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        buffers=policy.buffers,
    )


def _what_helps(config: Config, sequence: int) -> tuple[str, int]:
    """The one change of a key that lowers the peak most, and the peak with it."""
    train = config.train
    changes: dict[str, dict[str, Any]] = {"train.activation_checkpointing=true": {"activation_checkpointing": True}}
    if train.tokens_per_microbatch > sequence:
        changes[f"train.tokens_per_microbatch={sequence}"] = {"tokens_per_microbatch": sequence}
    if train.ranks > 1:
        changes["train.zero_stage=3"] = {"zero_stage": 3}
    if train.lora is None and train.tensor_parallel == 1:
        changes["train.lora={r: 16}"] = {"lora": {"r": 16}}
    totals = {
        key: _of_config(config, train.model_copy(update=change), sequence).total for key, change in changes.items()
    }
    best = min(totals, key=lambda key: totals[key])
    return best, totals[best]


def _shape(path: str) -> ModelShape:
    return shape_from(config_of(path))


def _ram_bytes() -> int:
    """Of the machine, or of the container where that has less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP_LIMIT.read_text(encoding="utf-8").strip() if CGROUP_LIMIT.is_file() else "max"
    return machine if limit == "max" else min(machine, int(limit))


def _gpu_bytes() -> int | None:
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
