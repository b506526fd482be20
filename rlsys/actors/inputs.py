"""What a run is built from, beside its configuration."""

from __future__ import annotations

from dataclasses import dataclass

from rlsys.prompts.source import PromptSource
from rlsys.rollout.vllm_settings import AdapterRoom


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What a configuration points at, found and checked before any actor starts.

    Attributes:
        model_path: local Hugging Face folder.
        longest_prompt: tokens, over training and held-out questions.
        pad_token_id: fills rows of a microbatch; carries no weight.
        reward_path: import path of the reward function.
        source: the questions.
        adapter_room: what engines keep room for where they get adapters alone; None: they get all weights.
        teacher_path, critic_path: local folders of these models; None where the config names none.
    """

    model_path: str
    longest_prompt: int
    pad_token_id: int
    reward_path: str
    source: PromptSource
    teacher_path: str | None = None
    critic_path: str | None = None
    adapter_room: AdapterRoom | None = None
