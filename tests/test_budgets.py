"""Sizes that keep the code readable. An exception stands in the table below with its reason."""

import ast
from pathlib import Path

import pytest

from rlsys.config.load import config_keys

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "rlsys").rglob("*.py"))

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400
MAX_CONFIG_KEYS = 150

# "path" or "path:function" to the reason why it may be longer
EXCEPTIONS: dict[str, str] = {}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions_of(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(), filename=str(path))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_keep_to_their_budget(path: Path):
    if name_of(path) not in EXCEPTIONS:
        assert len(path.read_text().splitlines()) <= MAX_FILE_LINES
    for function in functions_of(path):
        if f"{name_of(path)}:{function.name}" not in EXCEPTIONS:
            assert lines_of(function) <= MAX_FUNCTION_LINES, f"{function.name}, line {function.lineno}"


def test_exceptions_are_needed_and_have_a_reason():
    for name, reason in EXCEPTIONS.items():
        path, _, function = name.partition(":")
        assert len(reason.split()) >= 4, name
        if function:
            assert any(f.name == function and lines_of(f) > MAX_FUNCTION_LINES for f in functions_of(ROOT / path)), name
        else:
            assert len((ROOT / path).read_text().splitlines()) > MAX_FILE_LINES, name


def test_config_keys_keep_to_their_budget():
    assert len(list(config_keys())) <= MAX_CONFIG_KEYS


def test_every_config_key_says_what_it_is():
    assert [key for key, field in config_keys() if not field.description] == []
