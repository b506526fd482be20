"""Whether processes can share the rows of a model (DeepSpeed's Ulysses), known from its config alone."""

from __future__ import annotations

from typing import Any

from rlsys.actors.algorithm import needs_of
from rlsys.algo.rows import Need
from rlsys.config.schema import Config
from rlsys.errors import ConfigError
from rlsys.plan.tensor_parallel import config_of


def check_sequence_parallel(config: Config) -> None:
    """Raises ConfigError where ``train.sequence_parallel`` processes cannot share the rows of the policy."""
    train = config.train
    if train.sequence_parallel == 1:
        return
    key = f"train.sequence_parallel={train.sequence_parallel}"
    beside = {
        f"train.tensor_parallel={train.tensor_parallel}": train.tensor_parallel > 1,
        f"train.expert_parallel={train.expert_parallel}": train.expert_parallel > 1,
        "a critic (algo.advantage)": Need.CRITIC in needs_of(config),
    }
    for other, is_set in beside.items():
        if is_set:
            raise ConfigError(
                key,
                got=f"{other} beside it",
                wanted="one of them: rows are shared out of the policy alone, and layers or experts with whole rows",
                remedy="set train.sequence_parallel=1, or do without the other",
            )
    model = config_of(config.model.path)
    _check_heads(key, model, train.sequence_parallel)
    _check_attention(key, model)


def _check_heads(key: str, model: Any, parts: int) -> None:
    heads = model.num_attention_heads
    pairs = getattr(model, "num_key_value_heads", None) or heads
    if heads % parts or (pairs % parts and parts % pairs):
        raise ConfigError(
            key,
            got=f"{heads} attention heads and {pairs} key-value heads",
            wanted="a number that divides the heads, and divides the key-value heads or is a multiple of them: within "
            "attention each process has some heads",
            remedy="set train.sequence_parallel to such a number, or to 1",
        )


def _check_attention(key: str, model: Any) -> None:
    window = getattr(model, "sliding_window", None) if getattr(model, "use_sliding_window", True) else None
    kinds = set(getattr(model, "layer_types", None) or ()) - {"full_attention"}
    capped = getattr(model, "attn_logit_softcapping", None)
    if window is not None or kinds or capped is not None:
        what = "capped attention scores" if capped is not None else f"sliding attention (window {window})"
        raise ConfigError(
            key,
            got=f"a model ({model.model_type}) with {what if window or capped else ', '.join(sorted(kinds))}",
            wanted="full attention in every layer: DeepSpeed's Ulysses leaves masks out, and only that of samples in a "
            "row is put back",
            remedy="set train.sequence_parallel=1",
        )
