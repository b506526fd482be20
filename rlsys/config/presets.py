"""Presets: named settings of the algorithm's table rows. A key given explicitly wins over the preset's.

All of them are group methods for answers with one reward. What a paper has beyond rows (its learning rate, its batch)
is not part of a preset.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsys.config.schema import Config, Row

TOKEN_MEAN, SEQUENCE_MEAN = Row(name="token_mean"), Row(name="seq_mean_token_mean")
TIS, NONE, CLIP = Row(name="tis"), Row(name="none"), Row(name="ppo_clip")


def _preset(
    advantage: str, loss: Row, correction: Row, *, anchor: str = "proximal", aggregation: Row = TOKEN_MEAN
) -> Mapping[str, Any]:
    return {
        "advantage": Row(name=advantage),
        "loss": loss,
        "correction": correction,
        "rejections": (),
        "anchor": anchor,
        "aggregation": aggregation,
    }


# Where the paper is synchronous, stale tokens are weighted by the truncated ratio of proximal to behaviour policy
# (tis): with rollout.max_staleness 0, and engine and learner in agreement, that ratio is 1.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Shao et al. 2024, arXiv:2402.03300
    "grpo": _preset("grpo", CLIP, TIS),
    # Liu et al. 2025, arXiv:2503.20783: no division by the group's std, lengths divided by a constant
    "dr_grpo": _preset("dr_grpo", CLIP, TIS, aggregation=Row(name="seq_mean_token_sum_norm", max_tokens=None)),
    # Ahmadian et al. 2024, arXiv:2402.14740
    "rloo": _preset("rloo", Row(name="reinforce"), TIS),
    # Zheng et al. 2025, arXiv:2507.18071
    "gspo": _preset("grpo", Row(name="gspo"), TIS, aggregation=SEQUENCE_MEAN),
    # MiniMax-M1, arXiv:2506.13585: its ratio is to the policy that sampled, and does the correction's work
    "cispo": _preset("grpo", Row(name="cispo"), NONE, anchor="behaviour"),
    # Gao et al. 2025, arXiv:2511.20347
    "sapo": _preset("grpo", Row(name="sapo"), TIS, aggregation=SEQUENCE_MEAN),
    # Fu et al. 2025, arXiv:2505.24298: decoupled PPO; tokens with a ratio above 5 are left out, as its recipes do
    "areal": _preset("grpo", CLIP, Row(name="importance", mode="mask", high=5.0)),
    # Wu et al. 2025, arXiv:2505.24034: AIPO
    "llamarl": _preset("dr_grpo", Row(name="reinforce"), Row(name="aipo")),
    # Ring-1T, arXiv:2510.18855
    "icepop": _preset("grpo", CLIP, Row(name="icepop"), aggregation=SEQUENCE_MEAN),
    # Hao et al. 2025, arXiv:2505.23585
    "opo": _preset("opo", CLIP, TIS),
    # Liu et al. 2025, arXiv:2508.08221
    "lite_ppo": _preset("lite_ppo", CLIP, TIS),
    # Chu et al. 2025, arXiv:2504.02546
    "gpg": _preset("gpg", Row(name="reinforce"), TIS),
}


def resolve(config: Config) -> Config:
    """The config with every algorithm key filled in, from the preset where it was left open."""
    preset = dict(PRESETS[config.algo.preset])
    if preset["aggregation"].params.get("max_tokens", 0) is None:
        preset["aggregation"] = Row(name="seq_mean_token_sum_norm", max_tokens=config.rollout.max_tokens)
    open_keys = {name: value for name, value in preset.items() if getattr(config.algo, name) is None}
    return config.model_copy(update={"algo": config.algo.model_copy(update=open_keys)})
