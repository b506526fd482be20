"""From a YAML file and ``key=value`` words to a ``Config``, or to an error: which key, where, and what instead."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from rlsys.config.schema import Config, Row, Section
from rlsys.config.source import parse, read_file
from rlsys.errors import ConfigError

TINY = "tiny"  # the model.path that means the embedded model
JOB_FOLDERS = "/runtime_resources/working_dir_files/"  # below it Ray unpacks what jobs bring, and deletes it later
MAX_NAME_BYTES = 255  # of a file or folder
NEAREST_SIBLING = 0.7  # difflib ratio from which a key of the same section is taken for the one that was meant
NEAREST_ANYWHERE = 0.6  # the same for the full dotted name
WANTED = {  # pydantic's words for these speak of its own types
    "missing": "a value",
    "model_type": "a mapping of keys to values",
    "dict_type": "a mapping of keys to values",
    "tuple_type": "a list",
    "string_type": "text",
    "string_pattern_mismatch": "letters, digits, '.', '_' and '-' only",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, lay ``key=value`` words over it (dotted keys, values in YAML), and check every key by itself.

    Relative paths in it (``run.root``, the data files, the model folder, a reward file) are taken from the current
    folder and made absolute, since actors run elsewhere.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a value of the wrong type or out of range, a
            ``run.root`` that Ray would delete.

    Example:
        ``load_config("configs/quickstart.yaml", ["rollout.max_staleness=0", "algo.correction={name: none}"])``
    """
    file = Path(path).expanduser()
    tree, lines = read_file(file)
    origins = {key: f"{file}, line {line}" for key, line in lines.items()}
    return _build(tree, origins, overrides)


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """The same config with ``key=value`` words laid over it. Raises ConfigError as ``load_config`` does."""
    # keys that nobody set stay unset: a preset may fill them in
    return _build(config.model_dump(mode="json", exclude_unset=True), {}, overrides)


def dump_config(config: Config) -> str:
    """The whole tree as YAML; ``load_config`` of it gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def config_keys(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the tree, dotted, with its declaration. A table row counts as one key."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from config_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _build(tree: dict[str, Any], origins: dict[str, str], overrides: Sequence[str]) -> Config:
    for word in overrides:
        key, value = _split_override(word)
        _lay_over(tree, key, value, word)
        origins[key] = f"command line, {word}"
    for section in Config.model_fields:
        if section in tree and tree[section] is None:  # 'train:' with nothing below it
            tree[section] = {}
    _refuse_unknown(tree, Config, "", origins)
    try:
        # Strict JSON: a text is no number and true is no 1, while a list is a tuple and a text is a path.
        config = Config.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        raise _translated(error, origins) from error
    return _with_absolute_paths(config)


def _split_override(word: str) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    key = key.strip()
    if not equals or not key or any(not part for part in key.split(".")):
        raise ConfigError(
            f"override '{word}'",
            got="no key=value with a dotted key",
            wanted="a word such as rollout.max_staleness=0",
            remedy="write the key, an equals sign and the value without spaces between, or quote the word",
        )
    return key, parse(text, what=f"override '{word}'")


def _lay_over(tree: dict[str, Any], key: str, value: Any, word: str) -> None:
    *sections, leaf = key.split(".")
    here = tree
    for depth, name in enumerate(sections):
        if here.get(name) is None:
            here[name] = {}
        if not isinstance(here[name], dict):
            raise ConfigError(
                f"override '{word}'",
                got=f"{'.'.join(sections[: depth + 1])} is {here[name]!r}, which has no keys below it",
                wanted="a key below a section, a table row or a mapping",
                remedy=f"give {'.'.join(sections[: depth + 1])} as a whole: key={{name: ...}}",
            )
        here = here[name]
    here[leaf] = value


def _refuse_unknown(tree: Mapping[Any, Any], section: type[Section], prefix: str, origins: Mapping[str, str]) -> None:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        field = section.model_fields.get(name)
        if field is None:
            known = [f"{prefix}{sibling}" for sibling in section.model_fields]
            nearest = nearest_key(key, known)
            raise ConfigError(
                key,
                got=f"an unknown key ({origins.get(key, 'given in code')})",
                wanted="one of " + ", ".join(known),
                remedy=f"did you mean {nearest}?" if nearest else "remove it, or see `rlsys check` for all keys",
            )
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section) and isinstance(value, dict):
            _refuse_unknown(value, field.annotation, f"{key}.", origins)


def nearest_key(key: str, siblings: Sequence[str]) -> str | None:
    """The key that was meant: a similar one in the section, one of that name elsewhere, or a similar one anywhere."""
    leaf = key.rpartition(".")[2]
    by_leaf = {sibling.rpartition(".")[2]: sibling for sibling in siblings}
    for match in difflib.get_close_matches(leaf, list(by_leaf), 1, NEAREST_SIBLING):
        return by_leaf[match]
    everywhere = [name for name, _ in config_keys()]
    for name in everywhere:
        if name.rpartition(".")[2] == leaf:
            return name
    return next(iter(difflib.get_close_matches(key, everywhere, 1, NEAREST_ANYWHERE)), None)


def _translated(error: ValidationError, origins: Mapping[str, str]) -> ConfigError:
    first, *others = error.errors(include_url=False)
    key = _dotted(first)
    got = "nothing" if first["type"] == "missing" else repr(first["input"])
    wanted = WANTED.get(first["type"]) or first["msg"].removeprefix("Input should be ")
    also = f" Also wrong: {', '.join(dict.fromkeys(_dotted(other) for other in others))}." if others else ""
    where = origins.get(key) or next((origins[k] for k in _parents(key) if k in origins), "given in code")
    return ConfigError(key, got=f"{got} ({where})", wanted=wanted, remedy=_remedy(key, first) + also)


def _dotted(error: ErrorDetails) -> str:
    return ".".join(str(part) for part in error["loc"])


def _parents(key: str) -> Iterator[str]:
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def _remedy(key: str, error: ErrorDetails) -> str:
    fields = dict(config_keys())
    field = fields.get(key) or next((fields[k] for k in _parents(key) if k in fields), None)
    if field is None:
        return f"write the keys of {key} below it" if key in Config.model_fields else "correct the value"
    if _is_row(field) and error["type"] in ("model_type", "model_attributes_type"):
        return f"write the row by its name with its parameters: {{name: {error['input']}}}"
    if _is_row(field):
        return f"name the row: {{name: ...}}. {field.description or ''}".rstrip()
    default = field.get_default(call_default_factory=True)
    return f"{field.description or 'Correct the value.'} Default: {default}.".replace("\n", " ")


def _is_row(field: FieldInfo) -> bool:
    kinds = (field.annotation, *get_args(field.annotation))
    return any(isinstance(kind, type) and issubclass(kind, BaseModel) and kind is Row for kind in kinds)


def _with_absolute_paths(config: Config) -> Config:
    """Paths seen from the current folder. ``python.module:function`` and ``tiny`` are no paths and stay."""
    data = {
        name: _absolute(path, f"data.{name}")
        for name in ("train_path", "eval_path")
        if (path := getattr(config.data, name))
    }
    model = _model_path(config.model.path, "model.path")
    reward = config.reward.path
    if reward is not None:
        file, colon, function = reward.rpartition(":")
        reward = f"{_absolute(Path(file), 'reward.path')}:{function}" if colon and file.endswith(".py") else reward
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"root": _lasting(_absolute(config.run.root, "run.root"))}),
            "data": config.data.model_copy(update=data),
            "model": config.model.model_copy(update={"path": model}),
            "reward": config.reward.model_copy(update={"path": reward}),
            "critic": config.critic.model_copy(update={"path": _model_path(config.critic.path, "critic.path")}),
            "teacher": config.teacher.model_copy(update={"path": _model_path(config.teacher.path, "teacher.path")}),
        }
    )


def _model_path(path: str | None, key: str) -> str | None:
    return path if path is None or path == TINY else str(_absolute(Path(path), key))


def _lasting(root: Path) -> Path:
    """Refuses a folder of runs that Ray would delete: one inside the folder in which it unpacked a job's files."""
    if JOB_FOLDERS in root.as_posix():
        raise ConfigError(
            "run.root",
            got=f"{root}, inside the job's working folder, which Ray deletes",
            wanted="an absolute path outside of it, on a disk that outlives the job",
            remedy="run.root=/shared/runs",
        )
    return root


def _absolute(path: Path, key: str) -> Path:
    """Raises ConfigError for what no file system takes for a path."""
    if "\0" in str(path) or any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in path.parts):
        raise ConfigError(
            key,
            got=f"{str(path)[:80]!r}, with a zero character or a name of more than {MAX_NAME_BYTES} bytes",
            wanted="a path",
            remedy="correct the path",
        )
    return Path.cwd() / path.expanduser()
