"""One question, one answer."""

from __future__ import annotations

from rlsys.records import Message, Prompt


class SingleTurn:
    """Asks the prompt as it stands and ends after the first answer."""

    def reset(self, prompt: Prompt) -> tuple[Message, ...] | str:
        return prompt.content

    async def step(self, completion: str) -> tuple[Message, ...] | None:
        return None
