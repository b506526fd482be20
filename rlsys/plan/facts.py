"""What follows from a config: derived numbers, and sentences about them for `rlsys check`."""

from __future__ import annotations

from dataclasses import dataclass

from rlsys.buffer.staleness import lead_limit
from rlsys.config.schema import Config, Row
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
    """

    rows: dict[str, str]
    is_ratio_loss: bool
    source: PromptSource
    longest_prompt_tokens: int
    pad_token_id: int
    reward: str


def lead_bound(config: Config) -> int:
    """Most rollouts that may stand between their admission and the commit of their batch."""
    return lead_limit(max_staleness=config.rollout.max_staleness, batch_rollouts=config.rollouts_per_batch)


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


def in_words(row: Row) -> str:
    """A row as it is called: ``tis(cap=2.0)``."""
    return f"{row.name}({', '.join(f'{name}={value!r}' for name, value in row.params.items())})"


def _batches(config: Config) -> str:
    batch = config.rollouts_per_batch
    return (
        f"a batch: {config.train.prompts_per_batch} questions x {config.rollout.group_size} rollouts = {batch:,} "
        f"rollouts; {config.run.steps} batches: {batch * config.run.steps:,} rollouts trained"
    )


def _staleness(config: Config) -> str:
    eta = config.rollout.max_staleness
    lead = f"lead: at most ({eta} + 1) x {config.rollouts_per_batch:,} = {lead_bound(config):,} rollouts on their way"
    if eta == 0:
        return f"{lead}; synchronous: every token is sampled by the policy that it trains"
    old = (
        "a rollout with an older one is dropped" if config.rollout.age_policy == "drop" else "older ones weigh nothing"
    )
    return f"{lead}; age: a trained token is at most {eta} batch{'es' if eta > 1 else ''} old, {old}"


def _engines(config: Config) -> str:
    rollout = config.rollout
    at_once = rollout.replicas * rollout.slots
    limit = "the engines' slots limit" if at_once < lead_bound(config) else "the lead bound limits"
    return (
        f"engines: {rollout.replicas} x {rollout.slots} slots = {at_once:,} rollouts at once, so {limit} how many run; "
        f"temperature {rollout.temperature:g}"
    )


def _learner(config: Config) -> str:
    train = config.train
    updates = train.steps_per_batch * config.run.steps
    warmup = f", the first {train.warmup_steps} of them warming up" if train.warmup_steps else ""
    short = " (never reaching train.lr)" if train.warmup_steps > updates else ""
    return (
        f"learner: {train.ranks} rank{'s' if train.ranks > 1 else ''}, ZeRO stage {train.zero_stage}; "
        f"{updates} optimizer steps at learning rate {train.lr:g}{warmup}{short}"
    )


def _evaluation(config: Config) -> str:
    when = f"before, every {config.eval.every_steps} batches, after" if config.eval.every_steps else "before and after"
    if config.eval.samples == 0:
        return f"evaluation: greedy, {when}"
    at = ", ".join(map(str, config.eval.pass_at))
    return f"evaluation: greedy, {when}; pass@k for k = {at} from {config.eval.samples} samples, before and after"


def _objective(config: Config, rows: dict[str, str], is_ratio_loss: bool) -> list[str]:
    anchor = config.algo.anchor
    loss = f"{rows['loss']} at the {anchor} anchor"
    correction = "" if rows["correction"].startswith("none(") else f"{rows['correction']} x "
    rejections = [words for key, words in rows.items() if key.startswith("rejections")]
    lines = [
        f"objective: {rows['aggregation']} of {correction}{loss}, advantages {rows['advantage']}"
        + (f", without what {' or '.join(rejections)} takes out" if rejections else "")
    ]
    if config.train.steps_per_batch == 1 and anchor == "proximal" and is_ratio_loss:
        lines.append(
            "with one optimizer step a batch the loss's trust region never acts: policy and anchor are equal when the "
            "gradient is taken, so the loss is REINFORCE" + (" x the correction" if correction else "")
        )
    if config.rollout.max_staleness > 0 and not correction and anchor == "proximal":
        lines.append("stale tokens are trained without a correction, as algo.allow_uncorrected says")
    return lines
