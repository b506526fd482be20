"""Looking at what a config points at: the algorithm's tables, the model's folder, the data, the reward function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jinja2 import TemplateError

from rlsys.algo import ADVANTAGES, AGGREGATIONS, CORRECTIONS, POLICY_LOSSES
from rlsys.algo.rows import facts_of, inputs_of
from rlsys.algo.trial import try_row
from rlsys.config.schema import Config, Row
from rlsys.errors import ConfigError
from rlsys.plan import vllm_source
from rlsys.plan.facts import Found, in_words
from rlsys.plan.model_folder import check_model_folder, check_vocabulary, did_you_mean, load_tokenizer
from rlsys.plan.space import is_cluster_named
from rlsys.prompts.source import PromptSource, default_reward_path, load_questions
from rlsys.prompts.tasks import EXACT_MATCH
from rlsys.records import Message
from rlsys.reward.load import check_reward, load_reward
from rlsys.rollout.play import opening_tokens
from rlsys.rollout.vllm_settings import refuse_owned_arguments
from rlsys.train.deepspeed_config import deepspeed_config

# inputs that the batcher and the learner hand to rows
FED = frozenset(
    {
        *("policy_logprobs_T", "anchor_logprobs_T", "proximal_logprobs_T", "behaviour_logprobs_T", "advantages_T"),
        *("mask_T", "segments", "token_draws_T", "prompt_tokens_S", "settled"),
        *("rewards_S", "group_starts_G", "lengths_S"),
    }
)
COMPARING_REWARDS = (EXACT_MATCH, "rlsys.reward.builtin:final_number", "rlsys.reward.math_answer:math_verify_score")


def check_references(config: Config) -> Found:
    """Look at everything that a resolved config points at, the quick looks first. Starts nothing.

    Raises:
        ConfigError: the first thing found that cannot work.
    """
    check_vllm_options(config)
    check_deepspeed_options(config)
    model = check_model_folder(config)
    check_gpus(config)
    rows = check_rows(config)
    data = load_questions(config.data)
    reward = check_reward_function(config, data.split.train[0].fields)
    check_answers(reward, [question.answer for question in (*data.split.train, *data.split.held_out)])
    tokenizer = load_tokenizer(config)
    check_vocabulary(tokenizer, model)
    contents = [question.content for question in (*data.split.train, *data.split.held_out)]
    check_chat_template(tokenizer, contents)
    longest = longest_prompt_tokens(tokenizer, contents)
    check_token_budget(config, longest, model.max_positions)
    return Found(
        rows=rows,
        is_ratio_loss=facts_of(POLICY_LOSSES[_row(config.algo.loss).name]).is_ratio_loss,
        source=PromptSource(data, seed=config.run.seed, max_requeues=config.data.max_requeues),
        longest_prompt_tokens=longest,
        # padding carries no weight, so that any token will do
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        reward=reward,
    )


def check_reward_function(config: Config, fields: Mapping[str, Any]) -> str:
    """The reward function can be imported and called, and finds its arguments among the data's columns.

    Args:
        fields: further columns of a question.

    Returns:
        Its import path.
    """
    path = config.reward.path or default_reward_path(config.data)
    check_reward(load_reward(path), fields)
    return path


def check_answers(reward: str, answers: Sequence[Any]) -> None:
    """Where a reward that comes with rlsys compares with an answer, every question has one."""
    missing = sum(answer is None for answer in answers)
    if missing and reward in COMPARING_REWARDS:
        raise ConfigError(
            "data.answer_key",
            got=f"no answer to {missing:,} of {len(answers):,} questions",
            wanted=f"an answer to every question, for {reward} to compare with",
            remedy="name the answers' column in data.answer_key, or a reward function of your own in reward.path",
        )


def check_rows(config: Config) -> dict[str, str]:
    """Every algorithm row exists in its table, takes the parameters given, and accepts their values.

    The values are tried by calling the function on three tokens.

    Returns:
        Each row in words, defaults included.
    """
    algo = config.algo
    given: list[tuple[str, Row | None, Mapping[str, Callable[..., Any]]]] = [
        ("advantage", algo.advantage, ADVANTAGES),
        ("loss", algo.loss, POLICY_LOSSES),
        ("correction", algo.correction, CORRECTIONS),
        *((f"rejections.{place}", row, CORRECTIONS) for place, row in enumerate(algo.rejections or ())),
        ("aggregation", algo.aggregation, AGGREGATIONS),
    ]
    words = {}
    for key, row, table in given:
        words[key] = check_row(f"algo.{key}", _row(row), table)
        check_row_can_be_fed(f"algo.{key}", table[_row(row).name])
    check_rows_fit(config)
    return words


def check_row_can_be_fed(key: str, function: Callable[..., Any]) -> None:
    """The run has what the row looks at; else the loss would be another one than its name says."""
    missing = [name for name in inputs_of(function) if name not in FED]
    if missing or facts_of(function).gives != "rollout":
        raise ConfigError(
            f"{key}.name",
            got=f"{function.__name__}, which needs what a run does not produce yet: "
            + (", ".join(missing) or f"advantages by {facts_of(function).gives}"),
            wanted="a row that can be computed in a run",
            remedy="call it from rlsys.algo, or choose another row",
        )


def check_rows_fit(config: Config) -> None:
    """Rows that together silently do nothing, or another thing than their names say, are refused."""
    algo = config.algo
    loss, aggregation = _row(algo.loss).name, _row(algo.aggregation).name
    facts = facts_of(POLICY_LOSSES[loss])
    if facts.aggregations and aggregation not in facts.aggregations:
        raise ConfigError(
            "algo.aggregation",
            got=f"{aggregation} with the loss {loss}",
            wanted=f"{' or '.join(facts.aggregations)}, as that loss is defined",
            remedy=f"set algo.aggregation={{name: {facts.aggregations[0]}}}, or choose another loss",
        )
    if facts.anchor is not None and algo.anchor != facts.anchor:
        raise ConfigError(
            "algo.anchor",
            got=f"{algo.anchor} with the loss {loss}",
            wanted=f"{facts.anchor}, as that loss is defined",
            remedy=f"set algo.anchor={facts.anchor}",
        )
    for place, row in enumerate(algo.rejections or ()):
        if facts_of(CORRECTIONS[row.name]).keeps_count:
            rejecting = ", ".join(name for name, function in CORRECTIONS.items() if not facts_of(function).keeps_count)
            raise ConfigError(
                f"algo.rejections.{place}.name",
                got=f"{row.name}, which weighs tokens and rejects none",
                wanted=f"one of {rejecting}",
                remedy="give it as algo.correction instead",
            )


def _row(row: Row | None) -> Row:
    """A row of a resolved config: the preset has filled it in where it was open."""
    assert row is not None
    return row


def check_row(key: str, row: Row, table: Mapping[str, Callable[..., Any]]) -> str:
    """One row of one table. Returns it in words, defaults included."""
    function = table.get(row.name)
    if function is None:
        raise ConfigError(
            f"{key}.name",
            got=repr(row.name),
            wanted="one of " + ", ".join(table),
            remedy=did_you_mean(row.name, table, "choose one of these"),
        )
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(function, eval_str=True).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for name, value in row.params.items():
        if name not in parameters:
            raise ConfigError(
                f"{key}.{name}",
                got=f"{row.name} has no such parameter",
                wanted="one of " + ", ".join(parameters) if parameters else f"no parameter: {row.name} has none",
                remedy=did_you_mean(name, parameters, "remove it"),
            )
        _check_type(f"{key}.{name}", value, parameters[name])
    missing = [
        name for name, p in parameters.items() if p.default is inspect.Parameter.empty and name not in row.params
    ]
    if missing:
        raise ConfigError(
            f"{key}.{missing[0]}", got="nothing", wanted=f"a value: {row.name} needs it", remedy="write it in the row"
        )
    try:
        try_row(partial(function, **row.params))
    except (AssertionError, ValueError, TypeError) as error:
        raise ConfigError(
            key, got=f"{in_words(row)}: {error}", wanted="values in range", remedy=f"see the docstring of {row.name}"
        ) from error
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    return in_words(Row(name=row.name, **{**defaults, **row.params}))


def check_vllm_options(config: Config) -> None:
    """The names in ``rollout.vllm`` are arguments of vLLM's engine, and none that rlsys sets itself."""
    refuse_owned_arguments(config.rollout.vllm)
    known = vllm_source.engine_arguments()
    for name in config.rollout.vllm:
        if known and name not in known:
            raise ConfigError(
                f"rollout.vllm.{name}",
                got="no argument of vLLM's engine",
                wanted="an argument of vllm's AsyncEngineArgs, with underscores",
                remedy=did_you_mean(name, known, "remove it"),
            )


def check_deepspeed_options(config: Config) -> None:
    deepspeed_config(config.train, device="cuda" if config.train.gpus_per_rank > 0 else "cpu")


def check_gpus(config: Config) -> None:
    """GPUs that are asked for exist, where the run has no cluster but this machine."""
    asked = [
        key
        for key, value in (
            ("rollout.gpus_per_replica", config.rollout.gpus_per_replica),
            ("train.gpus_per_rank", config.train.gpus_per_rank),
        )
        if value > 0
    ]
    if not asked or is_cluster_named(config):
        return
    if not torch.cuda.is_available():
        raise ConfigError(
            asked[0],
            got="GPUs asked for on a machine where torch sees none",
            wanted="0 here, or a cluster that has GPUs",
            remedy=f"set {'=0 and '.join(asked)}=0, or name a cluster: ray.address",
        )


def check_chat_template(tokenizer: Any, contents: Sequence[str | tuple[Message, ...]]) -> None:
    """The model's chat template renders every question: one of each sequence of roles is tried."""
    by_roles = {
        ("user",) if isinstance(content, str) else tuple(message["role"] for message in content): content
        for content in contents
    }
    for roles, content in by_roles.items():
        try:
            opening_tokens(tokenizer, content)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise ConfigError(
                "model.path: the chat template",
                got=f"{type(error).__name__}: {error}, on a question of the roles {', '.join(roles)}",
                wanted="a template that renders every question as the beginning of a conversation",
                remedy="correct the template in the model's folder, or the roles in the data",
            ) from error


def longest_prompt_tokens(tokenizer: Any, contents: Sequence[str | tuple[Message, ...]]) -> int:
    """Tokens of the longest prompt, chat template included.

    A token stands for at least one byte, so prompts of fewer bytes (plus the template) than the longest one found
    has tokens are passed over.
    """
    template = len(opening_tokens(tokenizer, " "))
    longest = 0
    for most, content in sorted(((_most_tokens(c, template), c) for c in contents), key=lambda pair: -pair[0]):
        if most <= longest:
            break
        longest = max(longest, len(opening_tokens(tokenizer, content)))
    return longest


def check_token_budget(config: Config, longest_prompt: int, max_positions: int | None) -> None:
    """The longest possible sequence fits a microbatch and the model's context."""
    sequence = longest_prompt + config.rollout.max_tokens
    made_of = f"the longest prompt has {longest_prompt} tokens, rollout.max_tokens is {config.rollout.max_tokens}"
    if sequence > config.train.tokens_per_microbatch:
        raise ConfigError(
            f"train.tokens_per_microbatch={config.train.tokens_per_microbatch}",
            got=f"sequences of up to {sequence} tokens: {made_of}",
            wanted=f"at least {sequence}, so that every sequence fits a microbatch",
            remedy=f"set train.tokens_per_microbatch={sequence} or more, lower rollout.max_tokens, or cut long prompts",
        )
    if max_positions is not None and sequence > max_positions:
        raise ConfigError(
            f"rollout.max_tokens={config.rollout.max_tokens}",
            got=f"sequences of up to {sequence} tokens: {made_of}",
            wanted=f"at most {max_positions}, the model's context (max_position_embeddings)",
            remedy=f"set rollout.max_tokens={max(1, max_positions - longest_prompt)} or less, or remove long prompts",
        )


def _most_tokens(content: str | tuple[Message, ...], template: int) -> int:
    texts = [content] if isinstance(content, str) else [message["content"] for message in content]
    return sum(len(text.encode()) + template for text in texts)


def _check_type(key: str, value: Any, parameter: inspect.Parameter) -> None:
    kind = parameter.annotation
    allowed = {float: (int, float), int: (int,), bool: (bool,), str: (str,)}.get(kind)
    if allowed is None or (isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))):
        return
    raise ConfigError(key, got=repr(value), wanted=f"a {kind.__name__}", remedy=f"the default is {parameter.default!r}")
