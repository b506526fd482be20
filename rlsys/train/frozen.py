"""Weights that are not trained: which ones, and how checkpoints do without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch.nn import Module, Parameter

from rlsys.errors import ConfigError


def freeze(model: Module, patterns: Sequence[str]) -> None:
    """Take the gradient from every parameter whose name one of ``patterns`` matches, as file names are matched. What
    has two names (a tied head) is frozen by either.

    Raises:
        ConfigError: a pattern matches nothing, or all of them leave nothing to train.
    """
    names: dict[Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for pattern in patterns:
        found = [own for own, called in names.items() if any(fnmatchcase(name, pattern) for name in called)]
        if not found:
            raise ConfigError(
                "train.frozen",
                got=f"{pattern!r}, which matches no parameter of the model",
                wanted=f"patterns of names such as {next(iter(names.values()))[0]}",
                remedy="correct it; * stands for any characters, dots too",
            )
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names):
        raise ConfigError(
            "train.frozen",
            got=f"{', '.join(patterns)}, which match all {len(names)} parameters",
            wanted="something left to train",
            remedy="freeze less",
        )


def leave_out_frozen(module: Module) -> None:
    """From now on ``state_dict`` has no frozen parameter under any of its names, and ``load_state_dict`` leaves them as
    they are."""

    def leave_out(of: Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name, _parameter in _frozen(of):
            state.pop(prefix + name, None)

    def take_own(of: Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state.update({prefix + name: parameter for name, parameter in _frozen(of)})

    module.register_state_dict_post_hook(leave_out)
    module.register_load_state_dict_pre_hook(take_own)


def is_any_frozen(module: Module) -> bool:
    return any(not parameter.requires_grad for parameter in module.parameters())


def _frozen(module: Module) -> Iterator[tuple[str, Parameter]]:
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            yield name, parameter
