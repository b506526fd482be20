"""Reading YAML so that a message can say where a key stands: values, and the line of every dotted key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from rlsys.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML with ``1e-5`` read as a number (YAML 1.1 takes it for text) and a key written twice refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key '{key}' is written twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in a YAML file, and the line (from 1) of each dotted key in it. An empty file is an empty mapping.

    Raises:
        ConfigError: there is no such file, it cannot be read, it is no YAML, or it holds something else than a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"config file {path}",
            got=f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}",
            wanted="a readable YAML file",
            remedy=f"check the path (relative to {Path.cwd()})",
        ) from error
    tree = parse(text, what=f"config file {path}")
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"config file {path}",
            got=f"a {type(tree).__name__} at the top",
            wanted="sections with keys, e.g. 'run: {name: first}'",
            remedy="write the keys below their sections",
        )
    try:
        return tree, _lines_of(yaml.compose(text, Loader=_Loader), "")
    except RecursionError as error:
        raise _too_deep(f"config file {path}") from error


def parse(text: str, what: str) -> Any:
    """The value that a piece of YAML stands for. Raises ConfigError with the line where it is no YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(
            f"{what}{where}",
            got=error.problem or "no YAML",
            wanted="valid YAML, every key once",
            remedy="correct that line (look for a missing colon, bracket or indentation)",
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(what, got=str(error), wanted="valid YAML", remedy="remove what is no text") from error
    except RecursionError as error:
        raise _too_deep(what) from error


def _too_deep(what: str) -> ConfigError:
    return ConfigError(
        what,
        got="brackets or sections within one another without end",
        wanted="sections with keys",
        remedy="remove the surplus brackets, or the alias that holds itself",
    )


def _lines_of(node: Any, prefix: str) -> dict[str, int]:
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = f"{prefix}{key_node.value}"
            lines[key] = key_node.start_mark.line + 1
            lines |= _lines_of(value_node, f"{key}.")
    return lines
