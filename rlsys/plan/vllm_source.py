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
MODELS = "vllm.model_executor.models."
FOLLOWING_LAYERS = {"o_proj", "down_proj"}  # what attention and MLP end with; vLLM takes each by itself


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


def adapter_layers(architecture: str) -> set[str]:
    """Last parts of the names of layers, as models' files have them, at which a dense model of this class may have
    low-rank adapters: those that are joined in vLLM, as the class says, and the ones that follow them. Empty where it
    takes none."""
    joined = [part for module, name in _text_classes(architecture) for part in _joined_layers(module, name)]
    return set(joined) | FOLLOWING_LAYERS if joined else set()


def _joined_layers(module: str, name: str) -> list[str]:
    """Of a model's class that takes adapters, or whose parent does."""
    body = _parsed("model_executor", "models", f"{module}.py").body
    found = next((node for node in body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if found is None:
        return []
    bases = [ast.unparse(base) for base in found.bases]
    homes = {
        alias.name: node.module.removeprefix(MODELS)
        for node in body
        if isinstance(node, ast.ImportFrom) and node.module and (node.level == 1 or node.module.startswith(MODELS))
        for alias in node.names
    }
    inherited = [part for base in bases if base in homes for part in _joined_layers(homes[base], base)]
    own = [
        part
        for node in found.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
        if "packed_modules_mapping" in ast.unparse(node).partition("=")[0]
        for parts in ast.literal_eval(node.value).values()
        for part in parts
    ]
    return own if own and ("SupportsLoRA" in bases or inherited) else inherited


def _text_classes(architecture: str) -> list[tuple[str, str]]:
    """Module and class of it in vLLM."""
    return [
        ast.literal_eval(value)
        for node in _parsed("model_executor", "models", "registry.py").body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        if ast.unparse(node.targets[0]) == TEXT_TABLES[0]
        for key, value in zip(node.value.keys, node.value.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == architecture
    ]


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
