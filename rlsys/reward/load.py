"""Find the reward function that ``reward.path`` names, and check that it can be called.

A reward function is called with keywords: ``prompt`` (text or a list of messages), ``completion`` (text), ``answer``,
and every other column of the data. One without ``**fields`` gets only the columns it names. One that rewards single
tokens or turns may name two more: ``completion_ids`` (list of int: every sampled token of the rollout, those of all its
turns one after another) and ``turn_lengths`` (list of int: sampled tokens of each turn). A column of the data that has
one of these names never hides them.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from rlsys.errors import ConfigError
from rlsys.records import Prompt
from rlsys.reward.result import Completion

RewardFunction = Callable[..., Any]

ALWAYS_PASSED = ("prompt", "completion", "answer")
PASSED_WHERE_NAMED = ("completion_ids", "turn_lengths")
WANTED = "def reward(prompt, completion, answer, **fields) -> float, plain or async"
_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def load_reward(path: str) -> RewardFunction:
    """The function named by ``package.module:function`` or ``file.py:function`` (absolute, or from the working folder).

    Raises:
        ConfigError: the path is malformed, its import fails, the module has no such function, or its signature does
            not take ``prompt``, ``completion`` and ``answer`` as keywords.
    """
    module_path, _, name = path.rpartition(":")
    if not module_path or not name.isidentifier():
        raise ConfigError(
            what="reward.path",
            got=repr(path),
            wanted="package.module:function, or file.py:function",
            remedy="Write the function's name after a colon, e.g. my_reward.py:reward.",
        )
    module = _import_file(path, Path(module_path)) if module_path.endswith(".py") else _import_module(path, module_path)
    function = getattr(module, name, None)
    if not callable(function):
        found = f"no function {name!r} in {module_path}" if function is None else f"{name} is no function: {function!r}"
        raise ConfigError(
            what=f"reward.path {path}",
            got=found,
            wanted=f"a function: {WANTED}",
            remedy=_nearest_function(name, module),
        )
    _check_signature(path, function)
    return function


def is_async_reward(function: RewardFunction) -> bool:
    """Whether the function is ``async def`` (also as the ``__call__`` of an object)."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def check_reward(function: RewardFunction, sample_fields: Iterable[str]) -> None:
    """Check that the data holds every argument that the function requires beyond those it is given anyway.

    Args:
        sample_fields: names of the data's other columns.

    Raises:
        ConfigError: an argument without a default is no column of the data.
    """
    passed = {*ALWAYS_PASSED, *PASSED_WHERE_NAMED}
    fields = sorted(set(sample_fields) - passed)
    for parameter in inspect.signature(function).parameters.values():
        required = parameter.kind in _BY_KEYWORD and parameter.default is inspect.Parameter.empty
        if required and parameter.name not in passed and parameter.name not in fields:
            nearest = get_close_matches(parameter.name, fields, n=1)
            hint = f"Did you mean the column {nearest[0]}? " if nearest else ""
            raise ConfigError(
                what=f"reward.path: argument {parameter.name!r} of {_name_of(function)}",
                got=f"data with the further columns {', '.join(fields) or '(none)'}",
                wanted=f"a column {parameter.name!r} in the data",
                remedy=f"{hint}Rename the argument or the column, or give the argument a default.",
            )


def arguments_for(function: RewardFunction, prompt: Prompt, completion: Completion) -> dict[str, Any]:
    """Keywords of one call. Messages are copied, so that a function that changes them changes only its own."""
    content: Any = prompt.content
    if not isinstance(content, str):
        content = [dict(message) for message in content]
    given = {**prompt.fields, "prompt": content, "completion": completion.text, "answer": prompt.answer}
    tokens = {"completion_ids": list(completion.token_ids), "turn_lengths": list(completion.turn_lengths)}
    parameters = inspect.signature(function).parameters.values()
    named = {parameter.name for parameter in parameters if parameter.kind in _BY_KEYWORD}
    given |= {name: value for name, value in tokens.items() if name in named}
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return given
    return {name: value for name, value in given.items() if name in named}


def _import_module(path: str, name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:  # a console script, unlike `python -m`, does not search the working folder
        sys.path.append(here)
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise _import_failed(path, name, error) from error


def _import_file(path: str, file: Path) -> ModuleType:
    file = file.expanduser().absolute()
    if not file.is_file():
        raise ConfigError(
            what=f"reward.path {path}",
            got=f"no file {file}",
            wanted="a Python file that holds the reward function",
            remedy=f"Correct the path (the working folder is {Path.cwd()}), or give an absolute one.",
        )
    if str(file.parent) not in sys.path:  # modules beside the file can be imported from it, as in a script
        sys.path.append(str(file.parent))
    name = f"rlsys_reward_file_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # a file that ends in .py always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _import_failed(path, str(file), error) from error
    return module


def _import_failed(path: str, target: str, error: BaseException) -> ConfigError:
    last_line = traceback.format_exception_only(error)[-1].strip()
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    where = frames[-1].filename, frames[-1].lineno
    if isinstance(error, SyntaxError) and error.filename:
        where = error.filename, error.lineno
    at = "" if where[0] in (__file__, importlib.__file__) else f" ({where[0]}, line {where[1]})"
    return ConfigError(
        what=f"reward.path {path}",
        got=f"importing {target} failed: {last_line}{at}",
        wanted="a module or file that can be imported",
        remedy="Correct what the error names; a missing package must be installed where the reward workers run.",
    )


def _check_signature(path: str, function: RewardFunction) -> None:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError as error:  # some functions written in C have none
        raise ConfigError(
            what=f"reward.path {path}",
            got="a function without a readable signature",
            wanted=WANTED,
            remedy="Wrap it in a Python function.",
        ) from error
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    named = [parameter.name for parameter in parameters.values() if parameter.kind in _BY_KEYWORD]
    missing = [name for name in ALWAYS_PASSED if name not in named and not open_ended]
    positional_only = [p.name for p in parameters.values() if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    if not missing and not positional_only:
        return
    nearest = [(match, name) for name in missing for match in get_close_matches(name, named, n=1)]
    raise ConfigError(
        what=f"reward.path {path}",
        got=f"def {_name_of(function)}{inspect.signature(function)}",
        wanted=WANTED,
        remedy="".join(f"Rename {wrong} to {right}. " for wrong, right in nearest)
        + f"Arguments are passed by keyword: {', '.join(ALWAYS_PASSED)}, then the data's other columns.",
    )


def _nearest_function(name: str, module: ModuleType) -> str:
    functions = sorted(key for key, value in vars(module).items() if inspect.isroutine(value) and key[0] != "_")
    nearest = get_close_matches(name, functions, n=1, cutoff=0.5)
    if nearest:
        return f"Did you mean {nearest[0]}?"
    return f"Choose one of its functions: {', '.join(functions)}." if functions else "It holds no public function."


def _name_of(function: RewardFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)
