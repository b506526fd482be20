"""Everything that can be known of a run before an actor starts: what cannot work is refused here (law 9)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlsys.actors.inputs import Inputs
from rlsys.config.checks import check_sections
from rlsys.config.load import TINY
from rlsys.config.schema import Config
from rlsys.models.tiny import tiny_model_path
from rlsys.plan import facts
from rlsys.plan.facts import Found
from rlsys.plan.memory import check_memory
from rlsys.plan.references import check_references
from rlsys.plan.space import check_space


@dataclass(frozen=True, kw_only=True, slots=True)
class Preflight:
    """A config that can work.

    Attributes:
        found: what it points at.
        sentences: what follows from it, for the person who reads `rlsys check`.
    """

    found: Found
    sentences: list[str]


def preflight(config: Config, *, resume: bool = False) -> Preflight:
    """Check a resolved config as a whole, and everything it points at. Starts nothing, writes nothing.

    Args:
        resume: the run goes on in its folder.

    Raises:
        ConfigError: the first thing found that cannot work.
    """
    check_sections(config, resume=resume)
    found = check_references(config)
    adapters_alone = found.adapters is not None and found.adapters.room is not None
    sequence = found.longest_prompt_tokens + config.rollout.max_tokens
    room = [
        facts.of_space(config, check_space(config, adapters_alone=adapters_alone)),
        facts.of_memory(check_memory(config, sequence)),
    ]
    return Preflight(found=found, sentences=[*facts.of_run(config), *facts.of_references(config, found), *room])


def run_inputs(config: Config, found: Found) -> Inputs:
    """What the actors are built from. The embedded model is made here at its first use, which takes about a minute."""
    return Inputs(
        model_path=_folder(config.model.path),
        longest_prompt=found.longest_prompt_tokens,
        pad_token_id=found.pad_token_id,
        reward_path=found.reward,
        source=found.source,
        teacher_path=None if config.teacher.path is None else _folder(config.teacher.path),
        critic_path=None if config.critic.path is None else _folder(config.critic.path),
        adapter_room=None if found.adapters is None else found.adapters.room,
    )


def _folder(path: str) -> str:
    return path if path != TINY else str(_embedded_model())


def _embedded_model() -> Path:
    is_new = True

    def tell(step: int, accuracy: float) -> None:
        nonlocal is_new
        if is_new:
            print("making the embedded model (once; about a minute)", flush=True)
        is_new = False

    return tiny_model_path(progress=tell)
