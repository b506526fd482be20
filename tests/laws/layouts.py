"""Law 4 as a table: the layouts of a step, tiny models, and how far a step's loss and gradient are from those of plain
transformers in one process, one sequence after the other; and the losses of twenty steps of AdamW."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from rlsys.algo.advantages import grpo
from rlsys.batch.build import build
from rlsys.records import RolloutGroup
from tests.laws.learner_ranks import VOCABULARY, Outcome, Ranks, make_groups, section
from tests.laws.test_gradient import (
    OLDEST_STEP,
    VERSION,
    gradient_of,
    packed,
    padded_rows,
    reference_step,
    relative_difference,
)

PLAIN_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "initializer_range": 0.1,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 1,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A column: what it shows, and how it differs from ``COMMON``."""

    kind: str
    shows: str
    config: Mapping[str, Any] = field(default_factory=lambda: PLAIN_HEADS)
    has_experts: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A row. ``is_padded``: each sequence has a row of its own, padded to the longest."""

    ranks: int = 1
    tensor_parallel: int = 1
    expert_parallel: int = 1
    sequence_parallel: int = 1
    zero_stage: int = 0
    tokens_per_microbatch: int = 128
    is_padded: bool = False
    activation_checkpointing: bool = False
    offload: str = "none"

    @property
    def processes(self) -> int:
        return self.ranks * self.tensor_parallel * self.sequence_parallel


ONE_KEY_VALUE_HEAD = {"num_attention_heads": 2, "num_key_value_heads": 1}

MODELS = {
    "Llama": Model(
        kind="llama",
        shows="own head; 3 key-value heads and 129 tokens, which two processes cannot share evenly",
        config={"num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": VOCABULARY + 1},
    ),
    "Qwen2 tied": Model(
        kind="qwen2", shows="head and embedding are one", config={**PLAIN_HEADS, "tie_word_embeddings": True}
    ),
    "Qwen2": Model(kind="qwen2", shows="own head, biases"),
    "Qwen3": Model(kind="qwen3", shows="norms inside the heads", config={**PLAIN_HEADS, "tie_word_embeddings": True}),
    "Gemma": Model(
        kind="gemma",
        shows="scaled embedding",
    ),
    "Gemma 2": Model(
        kind="gemma2",
        shows="capped attention and logits: from whole logits",
        config={**PLAIN_HEADS, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0, "sliding_window": 16},
    ),
    "Mixtral": Model(
        kind="mixtral",
        shows="experts",
        config={**PLAIN_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
        has_experts=True,
    ),
    "Qwen3-MoE": Model(
        kind="qwen3_moe",
        shows="more, smaller experts; weights of the chosen ones that do not add up to 1",
        config={
            **PLAIN_HEADS,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": False,
        },
        has_experts=True,
    ),
}

FURTHER = {
    "Gemma, one key-value head": Model(kind="gemma", shows="fewer heads than processes", config=ONE_KEY_VALUE_HEAD),
}

LAYOUTS = {
    "1 process, all in one row": Layout(tokens_per_microbatch=4096),
    "1 process, microbatches of 64 tokens": Layout(tokens_per_microbatch=64),
    "1 process, padded rows": Layout(is_padded=True),
    "1 process, activation checkpointing": Layout(activation_checkpointing=True),
    "dp 2": Layout(ranks=2),
    "dp 2, ZeRO-1": Layout(ranks=2, zero_stage=1),
    "dp 2, ZeRO-2": Layout(ranks=2, zero_stage=2, tokens_per_microbatch=64),
    "dp 2, ZeRO-3": Layout(ranks=2, zero_stage=3),
    "dp 2, ZeRO-3, activation checkpointing": Layout(ranks=2, zero_stage=3, activation_checkpointing=True),
    "tp 2": Layout(tensor_parallel=2),
    "tp 2, ZeRO-1": Layout(tensor_parallel=2, zero_stage=1),
    "tp 2, ZeRO-2": Layout(tensor_parallel=2, zero_stage=2, tokens_per_microbatch=64),
    "tp 2, ZeRO-3": Layout(tensor_parallel=2, zero_stage=3, activation_checkpointing=True),
    "dp 2, ep 2": Layout(ranks=2, expert_parallel=2),
    "dp 2, ep 2, ZeRO-1": Layout(ranks=2, expert_parallel=2, zero_stage=1),
    "dp 2, ep 2, ZeRO-2": Layout(ranks=2, expert_parallel=2, zero_stage=2, tokens_per_microbatch=64),
    "dp 4, ep 2, ZeRO-2": Layout(ranks=4, expert_parallel=2, zero_stage=2, activation_checkpointing=True),
    "sp 2": Layout(sequence_parallel=2),
    "sp 2, padded rows": Layout(sequence_parallel=2, is_padded=True),
    "sp 2, ZeRO-1": Layout(sequence_parallel=2, zero_stage=1, activation_checkpointing=True),
    "sp 2, ZeRO-3": Layout(sequence_parallel=2, zero_stage=3, tokens_per_microbatch=64),
    "dp 2 x sp 2, ZeRO-2": Layout(ranks=2, sequence_parallel=2, zero_stage=2),
    "dp 2 x tp 2": Layout(ranks=2, tensor_parallel=2),
    "dp 2 x tp 2, ZeRO-3": Layout(ranks=2, tensor_parallel=2, zero_stage=3, tokens_per_microbatch=64),
    "1 process, ZeRO-1, optimizer offloaded": Layout(zero_stage=1, offload="optimizer"),
    "dp 2, ZeRO-2, optimizer offloaded": Layout(ranks=2, zero_stage=2, offload="optimizer"),
    "dp 2, ZeRO-3, optimizer and weights offloaded": Layout(ranks=2, zero_stage=3, offload="optimizer+params"),
    "tp 2, ZeRO-2, optimizer offloaded": Layout(tensor_parallel=2, zero_stage=2, offload="optimizer"),
}


def can_run(model: Model, layout: Layout) -> bool:
    """DeepSpeed's tensor parallel does not cut experts, and only they can be shared out; its sequence parallel shares
    key-value heads out evenly, and knows no windows."""
    if layout.sequence_parallel > 1:
        heads = model.config.get("num_key_value_heads", 1)
        return "sliding_window" not in model.config and heads % layout.sequence_parallel == 0
    return layout.tensor_parallel == 1 if model.has_experts else layout.expert_parallel == 1


ADAM_MODEL = "Qwen2 tied"
ADAM_STEPS = 20
ADAM: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
MAX_NORM = 1.0
ADAM_LAYOUTS = [name for name, layout in LAYOUTS.items() if can_run(MODELS[ADAM_MODEL], layout)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Relative, of one step from the reference; each the worst over the processes."""

    loss: float
    norm: float
    gradient: float

    @property
    def worst(self) -> float:
        return max(self.loss, self.norm, self.gradient)


def make_folder(name: str, parent: Path) -> str:
    """Folder below ``parent`` of a model of ``MODELS`` or ``FURTHER``, written where it is not there yet."""
    of = {**MODELS, **FURTHER}[name]
    folder = parent / name.replace(" ", "_").lower()
    if not folder.exists():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(of.kind, **{**COMMON, **of.config}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms and biases start at 0 or 1; here none is what another one could be
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(folder)
    return str(folder)


class Steps:
    """Takes the same step of each model in each layout.

    Args:
        pair, four: two and four processes. What takes four has its own: DeepSpeed counts ZeRO-3 parameters in each
            process, and ends where processes that have seen different numbers of them meet.
        folder: where the models are put.
    """

    def __init__(self, pair: Ranks, four: Ranks, folder: Path) -> None:
        self.pair, self.four, self._folder = pair, four, folder
        self._groups = make_groups(VERSION)
        self.reference = cache(self._reference)
        self.adam_losses = cache(self._adam_losses)

    def path(self, name: str) -> str:
        """Folder of a model of ``MODELS`` or ``FURTHER``."""
        return make_folder(name, self._folder)

    def _reference(self, name: str) -> tuple[float, dict[str, np.ndarray]]:
        model: Any = AutoModelForCausalLM.from_pretrained(
            self.path(name), dtype=torch.float32, attn_implementation="eager" if name == "Gemma 2" else "sdpa"
        )
        loss, gradient = reference_step(model, self._groups)
        tensors = {key: torch.from_numpy(value) for key, value in gradient.items()}
        return loss, {key: value.numpy() for key, value in revert_weight_conversion(model, tensors).items()}

    def difference(self, name: str, layout: Layout) -> Difference:
        outcomes = self._run(name, layout, [self._groups])
        loss, gradient = self.reference(name)
        norm = sum(float(np.square(value.astype(float)).sum()) for value in gradient.values()) ** 0.5
        return Difference(
            loss=_worst([outcome.metrics[0]["actor/pg_loss"] for outcome in outcomes], loss),
            norm=_worst([outcome.metrics[0]["actor/grad_norm"] for outcome in outcomes], norm),
            gradient=relative_difference(gradient_of(outcomes[0]), gradient),
        )

    def adam_gap(self, layout: Layout) -> float:
        """Largest difference of a loss from the one of plain AdamW, over twenty recorded batches and all processes."""
        keys = {**ADAM, "optimizer": {"name": "adamw"}, "max_grad_norm": MAX_NORM}
        outcomes = self._run(ADAM_MODEL, layout, _recorded(self._groups), **keys)
        gaps = [
            abs(metrics["actor/pg_loss"] - loss)
            for outcome in outcomes
            for metrics, loss in zip(outcome.metrics, self.adam_losses(), strict=True)
        ]
        return max(gaps)

    def _adam_losses(self) -> list[float]:
        model = AutoModelForCausalLM.from_pretrained(self.path(ADAM_MODEL), dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
        losses = []
        for groups in _recorded(self._groups):
            losses.append(reference_step(model, groups)[0])
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
        return losses

    def _run(self, name: str, layout: Layout, recorded: Sequence[Sequence[RolloutGroup]], **keys: Any) -> list[Outcome]:
        """A step on each of the batches of groups."""
        samples = [build(groups, advantage=grpo, oldest_step=OLDEST_STEP, correct_at=1.0) for groups in recorded]
        batches = [
            (lambda rank, own=own: [padded_rows(own)])
            if layout.is_padded
            else packed(own, layout.ranks, layout.tokens_per_microbatch)
            for own in samples
        ]
        return (self.four if layout.processes > 2 else self.pair).run(
            layout.processes,
            lambda rank: [batch for of_rank in batches for batch in of_rank(rank)],
            model_path=self.path(name),
            train=section(
                layout.zero_stage,
                layout.ranks,
                tensor_parallel=layout.tensor_parallel,
                expert_parallel=layout.expert_parallel,
                sequence_parallel=layout.sequence_parallel,
                activation_checkpointing=layout.activation_checkpointing,
                offload=layout.offload,
                **keys,
            ),
        )


def _recorded(groups: Sequence[RolloutGroup]) -> list[list[RolloutGroup]]:
    """Twenty batches: pairs and triples of the groups, in turn."""
    chosen = [*itertools.combinations(groups, 2), *itertools.combinations(groups, 3)]
    return [list(own) for own in itertools.islice(itertools.cycle(chosen), ADAM_STEPS)]


def _worst(got: Sequence[float], wanted: float) -> float:
    return max(abs(value - wanted) for value in got) / abs(wanted)
