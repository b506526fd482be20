"""Presets: named settings of the algorithm's table rows. A row given explicitly wins over the preset's."""

from __future__ import annotations

from collections.abc import Mapping

from rlsys.config.schema import Config, Row

PRESETS: Mapping[str, Mapping[str, Row]] = {
    # Group-normalised advantages (Shao et al. 2024, arXiv:2402.03300), the clipped loss at the proximal anchor, and the
    # ratio of proximal to behaviour policy, truncated, as the weight of tokens that another version sampled.
    "grpo": {
        "advantage": Row(name="grpo"),
        "loss": Row(name="ppo_clip"),
        "correction": Row(name="tis"),
    },
}


def resolve(config: Config) -> Config:
    """The config with every algorithm row filled in, from the preset where it was left open."""
    preset = PRESETS[config.algo.preset]
    open_rows = {name: row for name, row in preset.items() if getattr(config.algo, name) is None}
    return config.model_copy(update={"algo": config.algo.model_copy(update=open_rows)})
