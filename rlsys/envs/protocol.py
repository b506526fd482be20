"""What an environment is: it opens a conversation and answers each completion, until it ends it."""

from __future__ import annotations

from typing import Protocol

from rlsys.records import Message, Prompt


class Env(Protocol):
    """One conversation. A fresh one is made for every rollout, so it may keep state."""

    def reset(self, prompt: Prompt) -> tuple[Message, ...] | str:
        """How the conversation opens: chat messages, or plain text."""
        ...

    async def step(self, completion: str) -> tuple[Message, ...] | None:
        """The messages that follow the model's answer; None ends the conversation."""
        ...
