"""Looking at what a config points at: the model's folder, the data, the reward function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jinja2 import TemplateError

from rlsys.algo import POLICY_LOSSES
from rlsys.algo.rows import facts_of
from rlsys.config.schema import Config
from rlsys.errors import ConfigError
from rlsys.plan.adapters import plan_adapters
from rlsys.plan.algorithm import check_rows, row_of
from rlsys.plan.engine_arguments import check_engine_arguments, check_engine_workers
from rlsys.plan.experts import check_experts
from rlsys.plan.facts import Found
from rlsys.plan.frozen import check_frozen
from rlsys.plan.model_folder import check_model_folder, check_vocabulary, load_tokenizer
from rlsys.plan.sequence_parallel import check_sequence_parallel
from rlsys.plan.space import is_cluster_named
from rlsys.plan.teacher import check_teacher
from rlsys.plan.tensor_parallel import check_tensor_parallel
from rlsys.plan.training import check_training
from rlsys.prompts.source import PromptSource, default_reward_path, load_questions
from rlsys.prompts.tasks import EXACT_MATCH
from rlsys.records import Message
from rlsys.reward.load import check_reward, load_reward
from rlsys.rollout.play import opening_tokens
from rlsys.rollout.vllm_settings import OWNED_ARGUMENTS, num_workers
from rlsys.train.lora import check_lora
from rlsys.weights.channel import check_channel

COMPARING_REWARDS = (EXACT_MATCH, "rlsys.reward.builtin:final_number", "rlsys.reward.math_answer:math_verify_score")


def check_references(config: Config) -> Found:
    """Look at everything that a resolved config points at, the quick looks first. Starts nothing.

    Raises:
        ConfigError: the first thing found that cannot work.
    """
    check_engine_arguments("rollout.vllm", config.rollout.vllm, OWNED_ARGUMENTS)
    check_engine_workers(config.rollout)
    check_channel(
        config.rollout.weight_channel,
        gpus_per_replica=config.rollout.gpus_per_replica,
        gpus_per_rank=config.train.gpus_per_rank,
        workers=num_workers(config.rollout.vllm),
    )
    check_training(config)
    if config.train.lora is not None:
        check_lora(config.train.lora)
    model = check_model_folder(config)
    check_gpus(config)
    rows = check_rows(config)
    check_tensor_parallel(config)
    check_frozen(config)
    check_experts(config)
    check_sequence_parallel(config)
    data = load_questions(config.data)
    reward = check_reward_function(config, data.split.train[0].fields)
    check_answers(reward, [question.answer for question in (*data.split.train, *data.split.held_out)])
    tokenizer = load_tokenizer(config)
    check_vocabulary(tokenizer, model)
    contents = [question.content for question in (*data.split.train, *data.split.held_out)]
    check_chat_template(tokenizer, contents)
    longest = longest_prompt_tokens(tokenizer, contents)
    check_token_budget(config, longest, model.max_positions)
    check_teacher(config, model, longest)
    adapters = plan_adapters(config)
    return Found(
        rows=rows,
        is_ratio_loss=facts_of(POLICY_LOSSES[row_of(config.algo.loss).name]).is_ratio_loss,
        source=PromptSource(data, seed=config.run.seed, max_requeues=config.data.max_requeues),
        longest_prompt_tokens=longest,
        # padding carries no weight, so that any token will do
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        reward=reward,
        adapters=adapters,
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


def check_gpus(config: Config) -> None:
    """GPUs that are asked for exist, where the run has no cluster but this machine."""
    asked = [
        key
        for key, value in (
            ("rollout.gpus_per_replica", config.rollout.gpus_per_replica),
            ("train.gpus_per_rank", config.train.gpus_per_rank),
            ("teacher.gpus", config.teacher.gpus if config.teacher.path is not None else 0),
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
