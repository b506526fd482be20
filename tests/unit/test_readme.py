"""What the README shows works as it stands."""

import json
import re
from pathlib import Path

import yaml

from rlsys.config.load import load_config
from rlsys.config.presets import resolve
from rlsys.config.schema import Row
from rlsys.plan.preflight import preflight
from rlsys.prompts.tasks import make_task

README = Path(__file__).parents[2] / "README.md"


def test_the_first_run_of_your_own_passes_the_checks(tmp_path, monkeypatch):
    blocks = dict(re.findall(r"^```(json|python|yaml)\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE))
    monkeypatch.chdir(tmp_path)
    question = json.loads(blocks["json"])
    rows = [{**question, "prompt": f"{question['prompt']} {number}"} for number in range(300)]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("my_reward.py").write_text(blocks["python"])
    Path("my_run.yaml").write_text(blocks["yaml"])
    assert yaml.safe_load(blocks["yaml"])["model"]["path"].startswith("path/to/")

    found = preflight(resolve(load_config("my_run.yaml", ["model.path=tiny"]))).found

    assert (found.source.num_train, found.source.num_eval) == (200, 100)


def test_the_generated_tasks_it_names_exist():
    tasks = [yaml.safe_load(task) for task in re.findall(r"task: (\{name: .*?\})", README.read_text())]
    assert len(tasks) == 2
    for task in tasks:
        small = {"size": 3} if task["name"].startswith("reasoning_gym.") else {"digits": 1}
        assert make_task(Row.model_validate({**task, **small})).questions
