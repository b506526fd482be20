"""A forward pass over a few tokens, by which a learner sees at its start whether the ways to its log-probabilities that
save time or memory lead to the same ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlsys.config.schema import TrainSection
from rlsys.errors import ConfigError
from rlsys.train.head import LeanHead
from rlsys.train.logprobs import logprobs_by
from rlsys.train.lora import base_of

_TRIED_TOKENS = 8
_ROUNDING = 1e-3  # nats; float32 gives 1e-6 to 1e-5, a cap or a factor on the logits some percent of a log-probability
_HALF_ROUNDING = 0.1  # of a model that computes in bfloat16


def tried(forward: Callable[..., Any], head: LeanHead | None, *, vocab_size: int, device: str) -> Tensor:
    """[2, 8]: log-probabilities of some tokens, and the entropies there."""
    token_ids = (torch.arange(_TRIED_TOKENS, device=device) % vocab_size).unsqueeze(0)
    position_ids = torch.arange(_TRIED_TOKENS, device=device).unsqueeze(0)
    with torch.no_grad():
        result = logprobs_by(forward, head, token_ids, position_ids, temperature=1.0)
    return torch.cat([result.logprobs, result.entropy])


def has_plain_head(model: Any, wanted: Tensor) -> bool:
    """Whether the logits are what the last linear layer gives. Tries it: some models cap, scale or shift what that
    gives, and say so in their code alone.

    Args:
        model: a causal language model of transformers, whole, on CPU, perhaps with adapters.
        wanted: of ``tried``, from its whole logits.
    """
    base = base_of(model)
    head = base.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return False
    got = tried(model, LeanHead(head), vocab_size=base.config.get_text_config().vocab_size, device="cpu")
    return bool((got - wanted).abs().max() <= _ROUNDING)


def check_is_same_model(got: Tensor, wanted: Tensor, train: TrainSection) -> None:
    """Refuse a model that is another one since its layers were cut: DeepSpeed cuts by names, and not every class does
    with its parts what their names say.

    Args:
        got, wanted: of ``tried``, after and before.

    Raises:
        ConfigError: in every process alike.
    """
    gap = float((got.cpu() - wanted).abs().max())
    is_rounded = train.dtype == "bfloat16" or "torch_autocast" in train.deepspeed
    if not gap <= (_HALF_ROUNDING if is_rounded else _ROUNDING):
        key = next(
            key for key in ("tensor_parallel", "expert_parallel", "sequence_parallel") if getattr(train, key) > 1
        )
        or_say = ", or say how to cut it in train.deepspeed.tensor_parallel.partition_config"
        raise ConfigError(
            f"train.{key}={getattr(train, key)}",
            got=f"other log-probabilities than those of the whole model, by up to {gap:.2g}",
            wanted="the same model, cut",
            remedy=f"set train.{key}=1{or_say if key == 'tensor_parallel' else ''}",
        )
