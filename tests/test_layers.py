"""Imports point one way, libraries stay behind walls, and the controller sees the world through its parts only."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "rlsys"
FILES = sorted(path for path in ROOT.rglob("*.py"))

# Layers from the bottom up. A package imports from lower layers and from itself; siblings never import each other.
LAYERS = (
    {"records", "errors"},
    {"config"},
    {"algo", "observe"},
    {"prompts", "envs", "reward", "buffer", "weights", "checkpoints"},
    {"batch"},
    {"rollout", "train", "models"},
    {"controller"},
    {"actors"},
    {"sim", "plan", "bench"},
    {"cli", "__init__"},
    {"__main__"},
)
LAYER_OF = {package: index for index, layer in enumerate(LAYERS) for package in layer}

# library: where it may be imported
WALLED = {
    "vllm": ("rollout/", "weights/"),
    "deepspeed": ("train/",),
    "ray": ("actors/", "observe/"),
}

# Time, randomness, ids, files, processes and remote calls reach these packages through handed-in parts.
SEALED = ("controller/", "buffer/")
FORBIDDEN_THERE = {
    "concurrent", "datetime", "glob", "http", "io", "multiprocessing", "os", "pathlib", "random", "ray", "requests",
    "secrets", "shutil", "signal", "socket", "subprocess", "tempfile", "threading", "time", "urllib", "uuid",
}  # fmt: skip
FORBIDDEN_CALLS = {"open", "input", "print", "exec", "eval", "__import__"}
FORBIDDEN_ATTRIBUTES = {("asyncio", "sleep"), ("asyncio", "to_thread"), ("np", "random"), ("numpy", "random")}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def package_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported module, dotted, with its line. ``from rlsys import x`` counts as ``rlsys.x``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def test_every_package_has_a_layer():
    assert {package_of(path) for path in FILES} - set(LAYER_OF) == set()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path: Path):
    here = package_of(path)
    for module, line in imports_of(parsed(path)):
        parts = module.split(".")
        if parts[0] != "rlsys" or len(parts) < 2 or parts[1] in ("__version__", here):
            continue
        assert LAYER_OF[parts[1]] < LAYER_OF[here], f"{name_of(path)}:{line} imports {module}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_libraries_stay_behind_their_walls(path: Path):
    for module, line in imports_of(parsed(path)):
        allowed = WALLED.get(module.split(".")[0])
        assert allowed is None or name_of(path).startswith(allowed), f"{name_of(path)}:{line} imports {module}"


@pytest.mark.parametrize("path", [path for path in FILES if name_of(path).startswith(SEALED)], ids=name_of)
def test_the_controller_and_the_buffer_touch_the_world_through_their_parts(path: Path):
    tree = parsed(path)
    for module, line in imports_of(tree):
        assert module.split(".")[0] not in FORBIDDEN_THERE, f"{name_of(path)}:{line} imports {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"{name_of(path)}:{node.lineno} calls {node.func.id}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            pair = (node.value.id, node.attr)
            assert pair not in FORBIDDEN_ATTRIBUTES, f"{name_of(path)}:{node.lineno} uses {'.'.join(pair)}"


@pytest.mark.parametrize(
    "modules",
    [
        "rlsys",
        "rlsys.records, rlsys.errors",
        "rlsys.config.load, rlsys.config.presets, rlsys.config.checks",
        "rlsys.cli",
    ],
)
def test_records_errors_config_and_cli_import_without_heavy_libraries(modules: str):
    heavy = ("torch", "ray", "vllm", "deepspeed", "transformers", "reasoning_gym")
    code = f"import sys, {modules}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
