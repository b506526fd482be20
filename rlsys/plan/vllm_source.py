"""What the installed vLLM knows, read from its source: importing it takes ten seconds.

Every answer is empty where vLLM is not installed: the driver of a remote cluster need not have it.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

# tables in vllm/model_executor/models/registry.py
TEXT_TABLES = ("_TEXT_GENERATION_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")
OTHER_TABLES = ("_EMBEDDING_MODELS", "_MULTIMODAL_MODELS", "_REWARD_MODELS", "_SEQUENCE_CLASSIFICATION_MODELS")


def engine_arguments() -> set[str]:
    """Names of the engine's arguments."""
    classes = [node for node in _parsed("engine", "arg_utils.py").body if isinstance(node, ast.ClassDef)]
    fields = [
        field
        for node in classes
        if node.name.endswith("EngineArgs")
        for field in node.body
        if isinstance(field, ast.AnnAssign)
    ]
    return {field.target.id for field in fields if isinstance(field.target, ast.Name)}


def architectures() -> tuple[set[str], set[str]]:
    """Names of model classes: those that generate text, and all others."""
    text: set[str] = set()
    others: set[str] = set()
    for node in _parsed("model_executor", "models", "registry.py").body:
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)):
            continue
        target = node.targets[0]
        table = target.id if isinstance(target, ast.Name) else ""
        for key, value in zip(node.value.keys, node.value.values, strict=True):
            if table not in TEXT_TABLES + OTHER_TABLES or not isinstance(key, ast.Constant):
                continue  # an entry without a key unpacks a part of another table
            is_text = table in TEXT_TABLES and "MultiModal" not in ast.unparse(value)
            (text if is_text else others).add(str(key.value))
    return text, others - text


def cpu_head_sizes() -> set[int]:
    """Sizes of attention heads for which the CPU backend has code."""
    return {
        int(ast.literal_eval(item))
        for function in ast.walk(_parsed("v1", "attention", "backends", "cpu_attn.py"))
        if isinstance(function, ast.FunctionDef) and function.name == "get_supported_head_sizes"
        for node in ast.walk(function)
        if isinstance(node, ast.Return) and isinstance(node.value, ast.List)
        for item in node.value.elts
    }


def _parsed(*path: str) -> ast.Module:
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return ast.Module(body=[], type_ignores=[])
    return ast.parse(Path(spec.submodule_search_locations[0]).joinpath(*path).read_text(encoding="utf-8"))
