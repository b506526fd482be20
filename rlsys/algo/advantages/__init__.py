"""ADVANTAGES: from rewards to advantages, for each rollout, turn or token."""

from rlsys.algo.advantages.batch import gdpo, gpg, lite_ppo, reinforce_pp_baseline
from rlsys.algo.advantages.group import dr_grpo, grpo, grpo_loo, grpo_passk, maxrl, opo, rloo
from rlsys.algo.advantages.tokens import TokenAdvantages, gae, reinforce_pp, remax, rewards_on_tokens
from rlsys.algo.advantages.turns import gigpo, turn_grpo
from rlsys.algo.rows import table

ADVANTAGES = table(
    grpo,
    dr_grpo,
    rloo,
    grpo_loo,
    maxrl,
    grpo_passk,
    opo,
    lite_ppo,
    gpg,
    reinforce_pp_baseline,
    gdpo,
    reinforce_pp,
    remax,
    gae,
    turn_grpo,
    gigpo,
)

__all__ = ["ADVANTAGES", "TokenAdvantages", "grpo", "rewards_on_tokens"]
