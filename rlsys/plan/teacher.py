"""Looking at the teacher of on-policy distillation: can it be served, and does it read the student's tokens?"""

from __future__ import annotations

from typing import Any

from rlsys.config.load import TINY
from rlsys.config.schema import Config
from rlsys.errors import ConfigError
from rlsys.models.tiny.model import make_tokenizer
from rlsys.plan.engine_arguments import check_engine_arguments
from rlsys.plan.model_folder import ModelFacts, check_model_folder
from rlsys.rollout.teacher import OWNED_ARGUMENTS


def check_teacher(config: Config, student: ModelFacts, longest_prompt: int) -> None:
    """Look at everything that ``teacher`` names; nothing where there is none. Loads no weights, imports no vllm.

    Args:
        student: of the model that is trained.
        longest_prompt: tokens.

    Raises:
        ConfigError: the first thing found that cannot work.
    """
    if config.teacher.path is None:
        return
    check_engine_arguments("teacher.vllm", config.teacher.vllm, OWNED_ARGUMENTS)
    teacher = _look_into_folder(config, config.teacher.path)
    check_same_tokenizer(config.model.path, config.teacher.path)
    longest = longest_prompt + config.rollout.max_tokens
    if teacher.max_positions is not None and longest > teacher.max_positions:
        raise ConfigError(
            f"rollout.max_tokens={config.rollout.max_tokens}",
            got=f"rollouts of up to {longest} tokens: the longest prompt has {longest_prompt}",
            wanted=f"at most {teacher.max_positions}, the teacher's context (max_position_embeddings)",
            remedy="lower rollout.max_tokens, remove long prompts, or choose a teacher with a longer context",
        )
    smaller = min(student.vocab_size, teacher.vocab_size)
    if config.teacher.top_k > smaller:
        raise ConfigError(
            f"teacher.top_k={config.teacher.top_k}",
            got=f"embeddings of {student.vocab_size} (student) and {teacher.vocab_size} (teacher) rows",
            wanted="no more candidates than tokens",
            remedy=f"set teacher.top_k={smaller} or less",
        )


def check_same_tokenizer(student_path: str, teacher_path: str) -> None:
    """Student and teacher give every token id the same text, added and special tokens included.

    Which of them ends an answer is not compared, nor how a text is cut into tokens: a base model and the chat model
    made of it may differ there, and the teacher reads token ids alone.

    Raises:
        ConfigError: they do not; names the first token id that differs.
    """
    student = _tokens(student_path, "model.path")
    teacher = _tokens(teacher_path, "teacher.path")
    for token_id in sorted(student.keys() | teacher.keys()):
        mine, its = student.get(token_id), teacher.get(token_id)
        if mine != its:  # None: no such token
            raise ConfigError(
                "teacher.path",
                got=f"another tokenizer than the student's: token {token_id} is {its!r} to the teacher, {mine!r} to "
                "the student",
                wanted="the tokenizer of model.path, since the teacher reads the student's token ids",
                remedy="choose a teacher and a student of one family",
            )


def _tokens(path: str, key: str) -> dict[int, str]:
    """Token id to its text. The vocabulary holds the added tokens too."""
    return {token_id: text for text, token_id in _load_tokenizer(path, key).get_vocab().items()}


def _load_tokenizer(path: str, key: str) -> Any:
    if path == TINY:
        return make_tokenizer()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # of any kind: the libraries below raise what a broken file makes them stumble over
        raise ConfigError(
            key,
            got=f"a tokenizer in {path} that does not load: {type(error).__name__}: {error}",
            wanted="a tokenizer of transformers",
            remedy="write it anew with save_pretrained",
        ) from error


def _look_into_folder(config: Config, path: str) -> ModelFacts:
    """As the folder of a model, with the teacher's own key in the errors."""
    rollout = config.rollout.model_copy(update={"gpus_per_replica": config.teacher.gpus})
    model = config.model.model_copy(update={"path": path})
    try:
        return check_model_folder(config.model_copy(update={"model": model, "rollout": rollout}), is_trained=False)
    except ConfigError as error:
        raise ConfigError("teacher.path", got=error.got, wanted=error.wanted, remedy=error.remedy) from error
