"""Settings of other systems, and the words of our command line that do the same. What their tables' rows are called
stands with our rows (``RowFacts.peers``); here is what is not a row: batches, staleness, anchors, and whole recipes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A setting elsewhere.

    Attributes:
        theirs: keys and values, with their default where it matters.
        ours: words of the command line; empty where there is nothing to set.
        difference: what is not the same, or why nothing is to be set.
    """

    theirs: str
    ours: tuple[str, ...] = ()
    difference: str = ""


def _is(theirs: str, *ours: str, difference: str = "") -> Setting:
    return Setting(theirs=theirs, ours=ours, difference=difference)


SETTINGS: Mapping[str, tuple[Setting, ...]] = {
    "verl": (
        _is(
            "data.train_batch_size=512, actor_rollout_ref.rollout.n=8",
            "train.prompts_per_batch=512",
            "rollout.group_size=8",
        ),
        _is(
            "actor.ppo_mini_batch_size=256 of 512",
            "train.steps_per_batch=2",
            difference="each rollout is trained once: there is no ppo_epochs above 1",
        ),
        _is(
            "actor.clip_ratio_low=0.2, clip_ratio_high=0.28",
            "algo.loss={name: dual_clip, eps_high: 0.28, c: 3.0}",
            difference="its vanilla loss has the dual clip on, at clip_ratio_c=3.0; ppo_clip has none",
        ),
        _is(
            "actor.loss_agg_mode=token-mean",
            "algo.aggregation={name: token_mean}",
            difference="seq-mean-token-sum-norm divides by the padded width there unless loss_scale_factor is set",
        ),
        _is(
            "actor.use_kl_loss=True, kl_loss_type=low_var_kl, kl_loss_coef=0.001",
            "algo.kl={name: k3}",
            "algo.kl_coef=0.001",
        ),
        _is(
            "algorithm.use_kl_in_reward=True, kl_penalty=kl, kl_ctrl.kl_coef=0.001",
            "algo.advantage={name: reinforce_pp}",
            "algo.kl={name: k1}",
            "algo.kl_coef=0.001",
            "algo.kl_in=reward",
        ),
        _is("algorithm.norm_adv_by_std_in_grpo=False", "algo.advantage={name: dr_grpo}"),
        _is("algorithm.filter_groups.enable=True", "algo.selection=[{name: zero_variance}]"),
        _is(
            "rollout_correction.rollout_is=token, rollout_is_threshold=2.0",
            "algo.correction={name: tis, cap: 2.0}",
        ),
        _is(
            "rollout_correction.rollout_is=sequence, rollout_is_threshold=2.0",
            "algo.correction={name: importance, level: sequence, high: 2.0}",
        ),
        _is(
            'rollout_correction.rollout_is=token, rollout_is_threshold="0.5_5.0"',
            "algo.correction={name: icepop, low: 0.5, high: 5.0}",
        ),
        _is(
            'rollout_correction.rollout_rs=seq_mean_k1, rollout_rs_threshold="0.99_1.02"',
            "algo.rejections=[{name: reject_k1, over: mean, low: 0.98039, high: 1.0101}]",
            difference="its code bounds behaviour / proximal, its documents and ours proximal / behaviour: the bounds "
            "change places and are inverted (a pair whose product is 1 stays)",
        ),
        _is(
            "rollout_correction.bypass_mode=True, loss_type=ppo_clip",
            "algo.anchor=behaviour",
            "algo.correction={name: none}",
        ),
        _is(
            "rollout_correction.bypass_mode=True, loss_type=reinforce, rollout_is=token",
            "algo.loss={name: reinforce}",
            "algo.correction={name: aipo, rho: 2.0}",
        ),
        _is(
            "async_training.staleness_threshold=0.1",
            "rollout.max_staleness=1",
            difference="a share of samples that may be stale there, whatever their age; here an age that none exceeds",
        ),
        _is("trainer.v1.sampler.max_off_policy_threshold=8, max_off_policy_strategy=drop", "rollout.max_staleness=8"),
    ),
    "TRL": (
        _is("num_generations=8", "rollout.group_size=8"),
        _is(
            "num_iterations=1, steps_per_generation = 4 x gradient_accumulation_steps",
            "train.steps_per_batch=4",
            difference="each rollout is trained once: there is no num_iterations above 1",
        ),
        _is(
            'loss_type="dapo", epsilon=0.2, epsilon_high=0.28',
            "algo.loss={name: dapo_clip}",
            "algo.aggregation={name: token_mean}",
        ),
        _is('loss_type="dr_grpo", scale_rewards="none"', "algo.preset=dr_grpo"),
        _is('importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4', "algo.preset=gspo"),
        _is('scale_rewards="group"', "algo.advantage={name: grpo, eps: 1.0e-4}"),
        _is("beta=0.04", "algo.kl={name: k3}", "algo.kl_coef=0.04"),
        _is("delta=4.0", "algo.loss={name: two_sided_clip, delta: 4.0}"),
        _is(
            'vllm_importance_sampling_correction=True, mode="sequence_mask", clip_max=3.0',
            "algo.correction={name: mis, high: 3.0}",
            difference="on by default there",
        ),
        _is("mask_truncated_completions=True", "algo.selection=[{name: overlong}]"),
        _is("use_adaptive_entropy=True", "algo.entropy_control={name: adaptive_entropy}"),
        _is(
            "AsyncGRPOTrainer: max_staleness=4",
            "rollout.max_staleness=4",
            "algo.anchor=behaviour",
            "algo.correction={name: none}",
            difference="clips at the policy that sampled, with no other correction; 0 schedules no work there, and is "
            "synchronous here",
        ),
    ),
    "OpenRLHF": (
        _is("--algo.advantage.estimator group_norm", "algo.advantage={name: grpo, eps: 1.0e-9}"),
        _is(
            "--algo.advantage.is_correction_enable, type tis, threshold 0.5 5.0",
            "algo.correction={name: importance, mode: clip, low: 0.5, high: 5.0}",
            difference="held on both sides there; elsewhere, and in our tis, from above only",
        ),
        _is("--algo.advantage.is_correction_type icepop", "algo.correction={name: icepop}"),
        _is("--algo.advantage.is_correction_type seq-mask-tis", "algo.correction={name: seq_mask_tis}"),
        _is("eps_clip_low_high 0.2 0.28", "algo.loss={name: dapo_clip}"),
        _is("--algo.kl.use_loss, k3", "algo.kl={name: k3}", "algo.kl_coef=0.01"),
        _is(
            "KL in the reward, k1, init_coef 0.01 (its default)",
            "algo.advantage={name: reinforce_pp}",
            "algo.kl={name: k1}",
            "algo.kl_coef=0.01",
            "algo.kl_in=reward",
        ),
        _is("--algo.dynamic_filtering_enable, range 0 1", "algo.selection=[{name: mean_between, low: 0.0, high: 1.0}]"),
        _is(
            "--train.async_enable, --train.async_queue_size 1",
            "rollout.max_staleness=1",
            difference="a queue of batches there, without versions: nothing is ever too old",
        ),
        _is("--train.partial_rollout_enable", difference="always: engines pause for the swap alone, and go on"),
    ),
    "AReaL": (
        _is(
            "rollout.max_head_offpolicyness=4",
            "rollout.max_staleness=4",
            difference="bounds there how far production leads; here no trained token is older either",
        ),
        _is("rollout.consumer_batch_size", difference="derived: prompts a batch x group size"),
        _is(
            "actor.use_decoupled_loss=true, rejection_sampling: level token, action mask, metric ratio, upper 5.0",
            "algo.preset=areal",
        ),
        _is(
            "actor.use_decoupled_loss=true, rejection_sampling=null",
            "algo.preset=areal",
            "algo.correction={name: none}",
            "algo.allow_uncorrected=true",
            difference="without rejection_sampling its decoupled loss has no behaviour weight, and only warns; that is "
            "refused here unless it is asked for",
        ),
        _is(
            "rejection_sampling: level token, action clamp, metric ratio, upper 2.0",
            "algo.correction={name: tis}",
        ),
        _is(
            "rejection_sampling: level token, action mask, metric binary_kl, upper 2.0",
            "algo.correction={name: kpop}",
        ),
        _is("actor.m2_threshold=0.04", "algo.correction={name: m2po, threshold: 0.04}"),
        _is("actor.ppo_n_minibatches=4", "train.steps_per_batch=4"),
        _is(
            "actor.prox_logp_method",
            difference="exact always: the training forward itself with one step a batch, one "
            "forward before the first step with more; its loglinear estimate is not offered",
        ),
        _is(
            "actor.eps_clip=0.2, eps_clip_higher=0.28, c_clip=3.0",
            "algo.loss={name: dual_clip, eps_high: 0.28, c: 3.0}",
        ),
        _is(
            "actor.importance_sampling_level=sequence",
            "algo.preset=gspo",
            difference="averages the advantages of a sequence; bounds from eps_clip there",
        ),
        _is(
            "actor.kl_ctl=0.1 (its default)",
            "algo.advantage={name: reinforce_pp}",
            "algo.kl={name: k1}",
            "algo.kl_coef=0.1",
            "algo.kl_in=reward",
        ),
        _is("gconfig.n_samples=16", "rollout.group_size=16"),
    ),
    "SkyRL": (
        _is(
            "fully_async.max_staleness_steps=4",
            "rollout.max_staleness=4",
            difference="a very long rollout may exceed it there, and is trained",
        ),
        _is("off_policy_correction.tis_ratio_type=token", "algo.correction={name: tis, cap: 2.0}"),
        _is(
            "off_policy_correction.tis_ratio_type=sequence",
            "algo.correction={name: importance, level: sequence, high: 5.0}",
        ),
        _is(
            "off_policy_correction.sequence_mask_metric=geometric",
            "algo.rejections=[{name: reject_k1, over: mean, low: 0.99, high: 1.01}]",
        ),
        _is(
            "off_policy_correction.outlier_token_is_threshold_low=1e-4",
            "algo.rejections=[{name: veto, low: 1.0e-4}]",
        ),
        _is("policy_loss_type=cispo", "algo.loss={name: cispo}"),
        _is("grpo_norm_by_std=False", "algo.advantage={name: dr_grpo}"),
        _is("use_kl_loss (on by default), k3, 0.001", "algo.kl={name: k3}", "algo.kl_coef=0.001"),
        _is("dynamic_sampling.type=filter", "algo.selection=[{name: zero_variance}]"),
    ),
}
