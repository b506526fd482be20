"""The recipes for GPUs pass `rlsys check`, on a small model of their kind and some questions made here."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from rlsys import cli
from rlsys.models.tiny import make_tiny
from tests.unit.test_prompt_folders import save_dataset_dict

CONFIGS = Path(__file__).parents[2] / "configs"
HAS_MATH_VERIFY = importlib.util.find_spec("math_verify") is not None


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Qwen2 folder with the context of the models that the recipes name."""
    folder = tmp_path_factory.mktemp("model")
    make_tiny(folder, warm_up=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32_768}))
    return folder


def check(config: str, *overrides: str):
    return CliRunner().invoke(cli.app, ["check", str(CONFIGS / config), *overrides])


def questions(prompt_key: str, numbers: range, answer: str) -> list[dict[str, Any]]:
    return [{prompt_key: f"What is {number} + 1?", "answer": answer.format(number + 1)} for number in numbers]


def test_the_recipe_for_one_machine_passes_the_checks(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    folder = Path("data/gsm8k")  # as the recipe names it: a folder of parquet files
    folder.mkdir(parents=True)
    for name, numbers in (("train-00000-of-00001", range(80)), ("test-00000-of-00001", range(100, 120))):
        table = pyarrow.Table.from_pylist(questions("question", numbers, "Add.\n#### {}"))
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet")
    result = check("qwen2.5_1.5b_gsm8k_1node.yaml", f"model.path={model}", "ray.address=10.0.0.1:6379")
    assert result.exit_code == 0, result.stderr
    assert "80 questions to train on, 20 held out" in result.stdout
    assert "4 x 256 slots = 1,024 rollouts at once" in result.stdout
    assert "learner: 4 ranks, ZeRO stage 2" in result.stdout and "final_number" in result.stdout


def test_the_recipe_for_a_cluster_passes_the_checks_where_its_reward_is_installed(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    answers = "\\frac{{{}}}{{2}}"
    save_dataset_dict(
        Path("data/math"),
        train=questions("problem", range(80), answers),
        test=questions("problem", range(100, 120), answers),
    )
    result = check("qwen2.5_7b_math_multinode.yaml", f"model.path={model}")
    if HAS_MATH_VERIFY:
        assert result.exit_code == 0, result.stderr
        assert "80 questions to train on, 20 held out" in result.stdout and "ZeRO stage 3" in result.stdout
    else:
        assert result.exit_code == 2
        assert "No module named 'math_verify'" in result.stderr and "must be installed" in result.stderr


def test_gpus_are_asked_for_where_there_are_none_and_refused(tmp_path, monkeypatch, model):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    result = check("qwen2.5_1.5b_gsm8k_1node.yaml", f"model.path={model}")
    assert result.exit_code == 2 and "rollout.gpus_per_replica=0 and train.gpus_per_rank=0" in result.stderr
