"""What follows from a config: derived numbers, and sentences about them for `rlsys check`."""

from __future__ import annotations

from dataclasses import dataclass

from rlsys.buffer.staleness import lead_limit
from rlsys.config.schema import Config
from rlsys.plan.adapters import AdapterPlan
from rlsys.plan.algorithm import in_words
from rlsys.plan.memory import FACTOR, MemoryPlan
from rlsys.plan.space import Space, in_units
from rlsys.prompts.source import PromptSource


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What the things that a config points at turned out to be.

    Attributes:
        rows: table rows with every parameter written out, e.g. ``{"correction": "tis(cap=2.0)"}``.
        is_ratio_loss: whether the loss's trust region acts only away from its anchor.
        source: the questions.
        longest_prompt_tokens: of all questions, as the rollout engines get them (chat template included).
        pad_token_id: fills what is empty in a microbatch.
        reward: import path of the reward function.
        adapters: how they get to the engines; None where none are trained.
    """

    rows: dict[str, str]
    is_ratio_loss: bool
    source: PromptSource
    longest_prompt_tokens: int
    pad_token_id: int
    reward: str
    adapters: AdapterPlan | None = None


def lead_bound(config: Config) -> int:
    """Most rollouts that may stand between their admission and the commit of their batch."""
    return lead_limit(
        max_staleness=config.rollout.max_staleness,
        batch_rollouts=config.rollouts_per_batch,
        oversample=config.rollout.oversample,
    )


def of_run(config: Config) -> list[str]:
    """Sentences that need nothing but the config."""
    return [
        f"run folder: {config.run.root / config.run.name}",
        _batches(config),
        _staleness(config),
        _engines(config),
        _learner(config),
        _evaluation(config),
    ]


def of_references(config: Config, found: Found) -> list[str]:
    """Sentences about what the config points at."""
    sequence = found.longest_prompt_tokens + config.rollout.max_tokens
    batches_an_epoch = found.source.num_train / config.train.prompts_per_batch
    return [
        f"data: {found.source.num_train:,} questions to train on, {found.source.num_eval:,} held out; one epoch is "
        f"{batches_an_epoch:,.1f} batches, the run draws {config.run.steps / batches_an_epoch:.2f} epochs",
        f"reward: {found.reward}",
        f"sequences: at most {found.longest_prompt_tokens} prompt + {config.rollout.max_tokens} sampled = {sequence} "
        f"tokens; a microbatch of {config.train.tokens_per_microbatch} holds "
        f"{config.train.tokens_per_microbatch // sequence} of that length",
        *_objective(config, found.rows, found.is_ratio_loss),
        *([] if found.adapters is None else [of_adapters(found.adapters)]),
    ]


def of_space(config: Config, space: Space) -> str:
    """What the run takes of shared memory and disk, and what is there."""
    where = "on the machine that the cluster chooses"
    if space.free_shm_bytes is not None:
        where = f"of {in_units(space.free_shm_bytes)} free"
    return (
        f"space: {space.num_parameters:,} parameters; shared memory: {in_units(space.shm_bytes)} for the weights, "
        f"{where}; disk: at most {in_units(space.disk_bytes)} for {config.checkpoint.keep + 1} checkpoints and the "
        f"exported model, of {in_units(space.free_disk_bytes)} free"
    )


def of_adapters(plan: AdapterPlan) -> str:
    """How they get to the engines."""
    if plan.room is None:
        return f"weight sync: engines get the adapters merged into all weights: {plan.why_merged}"
    return (
        f"weight sync: engines load the base model once, and get the adapters alone (rank {plan.room.rank}, at "
        f"{', '.join(plan.room.modules)})"
    )


def of_memory(plan: MemoryPlan) -> str:
    """What the learner takes of memory, and what is there."""
    learner, total = plan.learner, plan.learner.total
    parts = ", ".join(
        f"{name} {in_units(taken)}"
        for name in ("weights", "gradients", "optimizer", "activations", "buffers")
        if (taken := getattr(learner, name))
    )
    there = "" if plan.memory_bytes is None else f"; {in_units(plan.memory_bytes)} are there"
    if plan.memory_bytes is not None and plan.processes * total > plan.memory_bytes:
        there += ": it may not fit"
    each = "" if plan.processes == 1 else f"{plan.processes} processes, each "
    return (
        f"learner's memory: {each}about {in_units(total)} at the peak ({parts}), within a factor of {FACTOR:g}{there}"
    )


def _batches(config: Config) -> str:
    batch, train = config.rollouts_per_batch, config.train
    match train.batch_by:
        case "trained_tokens":
            return (
                f"a batch: the oldest finished groups of {config.rollout.group_size} rollouts that fill "
                f"{train.tokens_per_batch:,} sampled tokens; {config.run.steps} batches"
            )
        case "sampled_tokens":
            return (
                f"a batch: all groups of {config.rollout.group_size} rollouts that are finished once "
                f"{train.tokens_per_batch:,} tokens were sampled; {config.run.steps} batches; at most "
                f"{train.prompts_per_batch * (1 + config.rollout.oversample):g} groups are unfinished at a time"
            )
    return (
        f"a batch: {config.train.prompts_per_batch} questions x {config.rollout.group_size} rollouts = {batch:,} "
        f"rollouts; {config.run.steps} batches: {batch * config.run.steps:,} rollouts trained"
    )


def _staleness(config: Config) -> str:
    eta = config.rollout.max_staleness
    more = f" + {config.rollout.oversample:g}" if config.rollout.oversample else ""
    lead = (
        f"lead: at most ({eta} + 1{more}) x {config.rollouts_per_batch:,} = {lead_bound(config):,} rollouts on their "
        "way"
        if config.train.batch_by == "prompts"
        else f"lead: at most {eta} + 1 batches finished"
    )
    if config.rollout.age_policy == "pace":
        return f"{lead}; age: only the lead bounds it; older tokens are trained, and counted as staleness/violations"
    if eta == 0:
        return f"{lead}; synchronous: every token is sampled by the policy that it trains"
    old = (
        "a rollout with an older one is dropped" if config.rollout.age_policy == "drop" else "older ones weigh nothing"
    )
    return f"{lead}; age: a trained token is at most {eta} batch{'es' if eta > 1 else ''} old, {old}"


def _engines(config: Config) -> str:
    rollout, lead = config.rollout, lead_bound(config)
    if rollout.num_replicas is None:
        return (
            f"engines: as many as the cluster holds beside the learner, {rollout.slots} slots each; the lead bound "
            f"fills {lead / rollout.slots:.3g} of them; temperature {rollout.temperature:g}"
        )
    at_once = rollout.num_replicas * rollout.slots
    limit = "the engines' slots limit" if at_once < lead else "the lead bound limits"
    return (
        f"engines: {rollout.num_replicas} x {rollout.slots} slots = {at_once:,} rollouts at once, so {limit} how many "
        f"run; temperature {rollout.temperature:g}"
    )


def _learner(config: Config) -> str:
    train = config.train
    updates = train.steps_per_batch * config.run.steps
    warmup = f", the first {train.warmup_steps} of them warming up" if train.warmup_steps else ""
    schedule = "" if train.schedule.name == "constant" else f", then {in_words(train.schedule)}"
    rewarm = f", warming up for {train.rewarm_steps} steps after a resume" if train.rewarm_steps else ""
    half = " in bfloat16" if train.dtype == "bfloat16" else ""
    head = " (head in float32)" if train.float32_head else ""
    waits = "" if train.offload == "none" else f"; {train.offload.replace('+', ' and ')} offloaded to the CPU"
    short = " (never reaching train.lr)" if train.warmup_steps > updates else ""
    number = train.processes // train.ranks
    parts = f" of {number} processes each" if number > 1 else ""
    parts += f", every {train.expert_parallel} sharing the experts" if train.expert_parallel > 1 else ""
    again = ", activations computed again" if train.activation_checkpointing else ""
    what = "" if train.lora is None else f"; adapters {train.lora} on a base that is not trained"
    what += f"; not trained: {', '.join(train.frozen)}" if train.frozen else ""
    return (
        f"learner: {train.ranks} rank{'s' if train.ranks > 1 else ''}{parts}, ZeRO stage {train.zero_stage}{half}{head}"
        f"{again}{waits}; {updates} optimizer steps of {in_words(train.optimizer)} at learning rate {train.lr:g}"
        f"{warmup}{short}{schedule}{rewarm}{what}"
    )


def _evaluation(config: Config) -> str:
    when = f"before, every {config.eval.every_steps} batches, after" if config.eval.every_steps else "before and after"
    if config.eval.samples == 0:
        return f"evaluation: greedy, {when}"
    at = ", ".join(map(str, config.eval.pass_at))
    return f"evaluation: greedy, {when}; pass@k for k = {at} from {config.eval.samples} samples, before and after"


def _objective(config: Config, rows: dict[str, str], is_ratio_loss: bool) -> list[str]:
    anchor = config.algo.anchor
    correction = "" if rows["correction"].startswith("none(") else f"{rows['correction']} x "
    rejections = _in_order(rows, "rejections")
    lines = [
        f"objective: {rows['aggregation']} of {correction}{rows['loss']} at the {anchor} anchor{_terms(config, rows)}, "
        f"advantages {rows['advantage']}"
        + (f", without what {' or '.join(rejections)} takes out" if rejections else "")
    ]
    if shaping := _in_order(rows, "shaping"):
        lines.append(f"rewards: shaped by {', then '.join(shaping)}")
    if selection := _in_order(rows, "selection"):
        lines.append(
            f"groups: what is left by {', then '.join(selection)}; one left empty is replaced by another question"
        )
    lines += [*_models(config, rows), *_inactive(config, rows, is_ratio_loss)]
    if config.rollout.max_staleness > 0 and not correction and anchor == "proximal":
        lines.append("stale tokens are trained without a correction, as algo.allow_uncorrected says")
    return lines


def _in_order(rows: dict[str, str], key: str) -> list[str]:
    return [words for name, words in rows.items() if name.startswith(f"{key}.")]


def _terms(config: Config, rows: dict[str, str]) -> str:
    """The further terms of the loss, with their weights."""
    algo, teacher = config.algo, config.teacher
    terms = ""
    if algo.kl is not None and algo.kl_in == "loss":
        terms += f" + {algo.kl_coef:g} x {rows['kl']} to the reference"
    if teacher.path is not None and teacher.top_k:
        terms += f" + {teacher.coef:g} x reverse KL over the teacher's {teacher.top_k} likeliest tokens"
    if "entropy_control" in rows:
        terms += f" - {algo.entropy_coef:g} x entropy, {rows['entropy_control']}"
    return terms


def _models(config: Config, rows: dict[str, str]) -> list[str]:
    """The models around the policy."""
    algo, critic, teacher = config.algo, config.critic, config.teacher
    lines = []
    if algo.kl is not None:
        every = algo.reference_every_steps
        kept = f"becomes the policy every {every} batches" if every else "stays the model of the start"
        own = (
            f"a copy on every learner rank that {kept}" if config.train.lora is None else "the base below the adapters"
        )
        where = "" if algo.kl_in == "loss" else f"; {algo.kl_coef:g} x {rows['kl']} is taken off the rewards"
        lines.append(f"reference: {own}{where}; weight {rows['kl_control']}")
    if "critic.loss" in rows:
        alone = f", alone for the first {critic.warmup_steps} batches" if critic.warmup_steps else ""
        lines.append(
            f"critic: starts from {critic.path or config.model.path}, {rows['critic.loss']} at learning rate "
            f"{critic.lr:g}{alone}"
        )
    if teacher.path is not None:
        how = (
            f"reverse KL over its {teacher.top_k} likeliest tokens" if teacher.top_k else "reverse KL of sampled tokens"
        )
        lines.append(
            f"teacher: {teacher.path}, {how}, weight {teacher.coef:g}, "
            + ("added to what the rewards say" if teacher.with_reward else "the only thing that is learnt from")
        )
    return lines


def _inactive(config: Config, rows: dict[str, str], is_ratio_loss: bool) -> list[str]:
    """What in the objective does nothing."""
    lines = []
    if config.teacher.path is not None and not config.teacher.with_reward:
        lines.append(
            f"inactive: the rewards and {rows['advantage']}; they are only measured, since teacher.with_reward is false"
        )
    if config.rollout.max_staleness == 0 and not rows["correction"].startswith("none("):
        lines.append(
            f"inactive: {rows['correction']}, but for rounding; with rollout.max_staleness 0 the learner's policy is "
            "the one that sampled"
        )
    if config.train.steps_per_batch == 1 and config.algo.anchor == "proximal" and is_ratio_loss:
        weighted = "" if rows["correction"].startswith("none(") else " x the correction"
        lines.append(
            "inactive: with one optimizer step a batch the loss's trust region never acts: policy and anchor are equal "
            f"when the gradient is taken, so the loss is REINFORCE{weighted}"
        )
    return lines
