"""The DeepSpeed configuration of a learner: what rlsys derives, and what a user passes through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsys.config.schema import TrainSection
from rlsys.errors import ConfigError
from rlsys.train.optimizers import deepspeed_entry

_BUCKET_ELEMENTS = 50_000_000  # DeepSpeed's own default reserves 2 GB per reduction buffer, whatever the model

_OFFLOADED = {
    "none": (),
    "optimizer": ("offload_optimizer",),
    "optimizer+params": ("offload_optimizer", "offload_param"),
}

# DeepSpeed keys that follow from a key of rlsys, or from how the learner steps, and the remedy for who sets them.
_OURS = {
    "gradient_clipping": "Set train.max_grad_norm instead.",
    "zero_optimization.stage": "Set train.zero_stage instead.",
    "train_micro_batch_size_per_gpu": "Set train.tokens_per_microbatch instead.",
    "train_batch_size": "Set train.prompts_per_batch instead.",
    "gradient_accumulation_steps": "Leave it out: microbatches follow from train.tokens_per_microbatch.",
    "managed_gradient_accumulation": "Leave it out: the learner marks the last microbatch itself.",
    "fp16.enabled": "Use train.dtype=bfloat16: float16's loss scaling skips steps, and skipped steps are no versions.",
    "bf16.enabled": "Set train.dtype instead.",
    "optimizer": "Set train.optimizer instead, e.g. {name: sgd, momentum: 0.9}.",
    "scheduler": "Set train.schedule and train.warmup_steps instead.",
    "tensor_parallel.autotp_size": "Set train.tensor_parallel instead.",
    "sequence_parallel_size": "Set train.sequence_parallel instead.",
    "expert_parallel.enabled": "Set train.expert_parallel instead.",
    "expert_parallel.autoep_size": "Set train.expert_parallel instead.",
}
# DeepSpeed's sections; it takes none of them in another form.
_SECTIONS = ("zero_optimization", "bf16", "fp16", "tensor_parallel", "expert_parallel")
_WANTED_WHERE_UNSET = {
    "fp16.enabled": False,
    "bf16.enabled": False,
    "managed_gradient_accumulation": True,
    "sequence_parallel_size": 1,
    "expert_parallel.enabled": False,
    "expert_parallel.autoep_size": 1,
}


def deepspeed_config(train: TrainSection, *, device: str) -> dict[str, Any]:
    """The dict for ``deepspeed.initialize``: ours, with ``train.deepspeed`` merged over it.

    Args:
        device: ``cpu`` or ``cuda``.

    Raises:
        ConfigError: an entry of ``train.deepspeed`` contradicts ours.
    """
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": {"stage": train.zero_stage, "reduce_bucket_size": _BUCKET_ELEMENTS},
        "zero_allow_untested_optimizer": True,
        "tensor_parallel": {"autotp_size": train.tensor_parallel},
        "optimizer": deepspeed_entry(train, device=device),
    }
    if train.expert_parallel > 1:
        ours["expert_parallel"] = {"enabled": True, "autoep_size": train.expert_parallel}
    if train.dtype == "bfloat16":
        ours["bf16"] = {"enabled": True}
    for part in _OFFLOADED[train.offload]:
        ours["zero_optimization"][part] = {"device": "cpu"}
    if ours["optimizer"]["type"] == "Muon" and train.zero_stage == 3:
        ours["zero_optimization"]["reduce_scatter"] = False  # it needs whole gradients, and DeepSpeed says so
    _refuse_other_forms(train)
    _refuse_contradictions(train, ours)
    return _merge(ours, train.deepspeed)


def _refuse_other_forms(train: TrainSection) -> None:
    for key in _SECTIONS:
        got = _look_up(train.deepspeed, key)
        if got is not None and not isinstance(got, Mapping):
            raise ConfigError(
                f"train.deepspeed.{key}",
                repr(got),
                "a mapping of keys to values",
                "Write DeepSpeed's keys below it, e.g. zero_optimization: {overlap_comm: true}.",
            )


def _refuse_contradictions(train: TrainSection, ours: Mapping[str, Any]) -> None:
    keys = dict(_OURS)
    if train.sequence_parallel > 1 and train.zero_stage == 3:
        keys["zero_optimization.reduce_scatter"] = (
            "Leave it out: the other way of reducing weighs pieces of rows apart."
        )
    for key, remedy in keys.items():
        got = _look_up(train.deepspeed, key)
        wanted = _look_up(ours, key)
        if wanted is None:
            wanted = _WANTED_WHERE_UNSET.get(key)
        if got is not None and got != wanted:
            needed = "no entry" if wanted is None else f"{wanted!r}, or no entry"
            raise ConfigError(f"train.deepspeed.{key}", repr(got), needed, remedy)


def _look_up(tree: Mapping[str, Any], dotted: str) -> Any:
    value: Any = tree
    for key in dotted.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` on ``base``, section by section; neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping):
            below = merged.get(key)
            merged[key] = _merge(below if isinstance(below, Mapping) else {}, value)
        else:
            merged[key] = value
    return merged
