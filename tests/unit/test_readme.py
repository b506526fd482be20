"""What the README shows works as it stands."""

import json
import re
from pathlib import Path

import yaml

from rlsys.config.load import apply_overrides, load_config
from rlsys.config.presets import PRESETS, resolve
from rlsys.config.schema import Config, Row
from rlsys.plan.preflight import preflight
from rlsys.plan.references import check_rows
from rlsys.prompts.tasks import make_task

README = Path(__file__).parents[2] / "README.md"


def blocks_of(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def test_the_first_run_of_your_own_passes_the_checks(tmp_path, monkeypatch):
    blocks = {kind: blocks_of(kind)[0] for kind in ("json", "python", "yaml")}
    monkeypatch.chdir(tmp_path)
    question = json.loads(blocks["json"])
    rows = [{**question, "prompt": f"{question['prompt']} {number}"} for number in range(300)]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("my_reward.py").write_text(blocks["python"])
    Path("my_run.yaml").write_text(blocks["yaml"])
    assert yaml.safe_load(blocks["yaml"])["model"]["path"].startswith("path/to/")

    found = preflight(resolve(load_config("my_run.yaml", ["model.path=tiny"]))).found

    assert (found.source.num_train, found.source.num_eval) == (200, 100)


def test_the_rows_and_presets_of_the_algorithm_that_it_names_exist():
    algo = blocks_of("yaml")[1]
    assert algo.startswith("algo:")
    words = [f"algo.{key}={json.dumps(value)}" for key, value in yaml.safe_load(algo)["algo"].items()]
    check_rows(resolve(apply_overrides(Config(), words)))
    text = README.read_text()
    named = text[text.index("`algo.preset` names") : text.index("Each key can be set by itself")]
    assert set(re.findall(r"`(\w+)`", named)) == set(PRESETS)


def test_the_generated_tasks_it_names_exist():
    tasks = [yaml.safe_load(task) for task in re.findall(r"task: (\{name: .*?\})", README.read_text())]
    assert len(tasks) == 2
    for task in tasks:
        small = {"size": 3} if task["name"].startswith("reasoning_gym.") else {"digits": 1}
        assert make_task(Row.model_validate({**task, **small})).questions
