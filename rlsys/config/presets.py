"""Presets: named settings of the algorithm's table rows. A key given explicitly wins over the preset's.

What a paper has beyond rows (its learning rate, its batch, a divergence from a reference) is not part of a preset.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsys.config.schema import Config, Row

TOKEN_MEAN, SEQUENCE_MEAN = Row(name="token_mean"), Row(name="seq_mean_token_mean")
TIS, NONE = Row(name="tis"), Row(name="none")
CLIP, REINFORCE = Row(name="ppo_clip"), Row(name="reinforce")
OVERLONG_SHARE = 5  # DAPO punishes answers within the last 4,096 of 20,480 tokens

Preset = Mapping[str, Any]


def _clipped(advantage: str, loss: Row = CLIP, **keys: Any) -> Preset:
    """With a trust region that acts away from its anchor only: two optimizer steps a batch."""
    return _preset(advantage, loss, steps_per_batch=2, **keys)


def _preset(
    advantage: str,
    loss: Row = REINFORCE,
    *,
    correction: Row = TIS,
    anchor: str = "proximal",
    aggregation: Row = TOKEN_MEAN,
    shaping: tuple[Row, ...] = (),
    selection: tuple[Row, ...] = (),
    steps_per_batch: int = 1,
) -> Preset:
    return {
        "advantage": Row(name=advantage),
        "loss": loss,
        "correction": correction,
        "rejections": (),
        "anchor": anchor,
        "aggregation": aggregation,
        "shaping": shaping,
        "selection": selection,
        "steps_per_batch": steps_per_batch,
    }


# Where the paper is synchronous, stale tokens are weighted by the truncated ratio of proximal to behaviour policy
# (tis): with rollout.max_staleness 0, and engine and learner in agreement, that ratio is 1. A parameter that is None
# follows from the config.
PRESETS: Mapping[str, Preset] = {
    # Shao et al. 2024, arXiv:2402.03300
    "grpo": _clipped("grpo"),
    # Liu et al. 2025, arXiv:2503.20783: no division by the group's std, lengths divided by a constant
    "dr_grpo": _clipped("dr_grpo", aggregation=Row(name="seq_mean_token_sum_norm", max_tokens=None)),
    # Yu et al. 2025, arXiv:2503.14476: clip-higher, every token weighs the same, long answers are punished before they
    # are cut, and groups without variance are replaced
    "dapo": _clipped(
        "grpo",
        Row(name="dapo_clip"),
        shaping=(Row(name="overlong_penalty", buffer=None),),
        selection=(Row(name="zero_variance"),),
    ),
    # Ahmadian et al. 2024, arXiv:2402.14740
    "rloo": _preset("rloo"),
    # Hu et al. 2025, arXiv:2501.03262, and its variant with the group's mean as baseline
    "reinforce_pp": _clipped("reinforce_pp"),
    "reinforce_pp_baseline": _clipped("reinforce_pp_baseline"),
    # Li et al. 2023, arXiv:2310.10505
    "remax": _preset("remax"),
    # Schulman et al. 2017, arXiv:1707.06347, with a critic
    "ppo": _clipped("gae"),
    # Yue et al. 2025, arXiv:2504.05118: of its parts the clip and the loss on right answers
    "vapo": _clipped("gae", Row(name="vapo_clip")),
    # Zheng et al. 2025, arXiv:2507.18071
    "gspo": _clipped("grpo", Row(name="gspo"), aggregation=SEQUENCE_MEAN),
    # Zhao et al. 2025, arXiv:2507.20673
    "gmpo": _clipped("grpo", Row(name="gmpo"), aggregation=SEQUENCE_MEAN),
    # MiniMax-M1, arXiv:2506.13585: its ratio is to the policy that sampled, and does the correction's work
    "cispo": _preset("grpo", Row(name="cispo"), correction=NONE, anchor="behaviour"),
    # Le Roux et al. 2025, arXiv:2503.14286: likewise
    "topr": _preset("dr_grpo", Row(name="topr"), correction=NONE, anchor="behaviour"),
    # Gao et al. 2025, arXiv:2511.20347
    "sapo": _clipped("grpo", Row(name="sapo"), aggregation=SEQUENCE_MEAN),
    # Fu et al. 2025, arXiv:2505.24298: decoupled PPO; tokens with a ratio above 5 are left out, as its recipes do
    "areal": _clipped("grpo", correction=Row(name="importance", mode="mask", high=5.0)),
    # Wu et al. 2025, arXiv:2505.24034: AIPO
    "llamarl": _preset("dr_grpo", correction=Row(name="aipo")),
    # Ring-1T, arXiv:2510.18855
    "icepop": _clipped("grpo", correction=Row(name="icepop"), aggregation=SEQUENCE_MEAN),
    # Ring-lite, arXiv:2506.14731: a step's loss is divided by a budget of tokens that is the same for every step
    "c3po": _clipped("grpo", aggregation=Row(name="constant", tokens=None)),
    # M2PO, 2025, arXiv:2510.01161
    "m2po": _clipped("grpo", correction=Row(name="m2po")),
    # Hao et al. 2025, arXiv:2505.23585
    "opo": _clipped("opo"),
    # Liu et al. 2025, arXiv:2508.08221
    "lite_ppo": _clipped("lite_ppo"),
    # Chu et al. 2025, arXiv:2504.02546
    "gpg": _preset("gpg"),
}


def resolve(config: Config) -> Config:
    """The config with every algorithm key filled in, from the preset where it was left open."""
    preset = dict(PRESETS[config.algo.preset])
    steps_per_batch = preset.pop("steps_per_batch")
    if "steps_per_batch" not in config.train.model_fields_set:
        train = config.train.model_copy(update={"steps_per_batch": steps_per_batch})
        config = config.model_copy(update={"train": train})
    open_keys = {name: _derived(value, config) for name, value in preset.items() if getattr(config.algo, name) is None}
    return config.model_copy(update={"algo": config.algo.model_copy(update=open_keys)})


def _derived(value: Any, config: Config) -> Any:
    """A preset's value with the parameters that follow from the config."""
    if isinstance(value, tuple):
        return tuple(_derived(row, config) for row in value)
    if not isinstance(value, Row):
        return value
    longest, budget = config.rollout.max_tokens, config.train.tokens_per_batch
    known = {
        "max_tokens": longest,
        # most that a step can have
        "tokens": (budget or longest * config.rollouts_per_batch) // config.train.steps_per_batch,
        "buffer": max(1, longest // OVERLONG_SHARE),
    }
    return Row(name=value.name, **{key: known[key] if given is None else given for key, given in value.params.items()})
