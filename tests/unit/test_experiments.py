"""What the comparison scripts read from a run's folder, and that a finished run is not run again."""

import json
from pathlib import Path

import pytest

from experiments import presets, runs
from experiments.runs import each, markdown_table, mean, outcome, put_table, read

RESULT = {
    "eval_before": 0.4,
    "eval_after": 0.8,
    "staleness/mean": 3.5,
    "rollouts_submitted": 200,
    "dropped/too_stale": 6.0,
    "dropped/reward_error": 4.0,
    "wall_s": 70.0,
    "exit": 0,
    "failure": "",
}
STEPS = [
    {"step": 1, "actor/pg_clipfrac": 0.1},
    {"step": 2, "actor/pg_clipfrac": 0.3, "val-core/sum-eval/acc/mean@1": 0.9},
    {"step": 3, "actor/pg_clipfrac": None, "val-core/sum-eval/acc/mean@1": 0.7},
]


def write_run(folder: Path, **changed: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({**RESULT, **changed}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in STEPS))
    return folder


def test_an_outcome_is_what_the_run_wrote(tmp_path):
    found = read(write_run(tmp_path / "run"))
    assert found.accuracies == (0.4, 0.9, 0.7, 0.8)
    assert (found.last, found.best) == (0.8, 0.9) and found.late == pytest.approx(0.8)
    assert found.clip_fraction == pytest.approx(0.2)
    assert found.dropped == pytest.approx(10 / 200)
    assert found.failure == ""


def test_a_failed_run_has_no_last_accuracy_but_its_best(tmp_path):
    found = read(write_run(tmp_path / "run", exit=1, failure="the loss is not finite", eval_after=None))
    assert found.failure == "the loss is not finite"
    assert (found.last, found.late, found.best) == (None, None, 0.9)


def test_a_finished_run_with_the_same_keys_is_read_not_run_again(tmp_path, monkeypatch):
    trained = []

    def train(words, folder):
        trained.append(folder.name)
        write_run(folder)

    monkeypatch.setattr(runs, "_train", train)
    keys = {"algo.preset": "grpo", "run.seed": "0"}
    outcome("grpo", keys, tmp_path)
    outcome("grpo", dict(reversed(keys.items())), tmp_path)
    assert len(trained) == 1
    outcome("grpo", {**keys, "run.seed": "1"}, tmp_path)
    assert len(set(trained)) == 2


def test_a_run_that_was_cut_short_is_run_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_train", lambda words, folder: write_run(folder))
    outcome("grpo", {}, tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / "result.json").unlink()
    assert outcome("grpo", {}, tmp_path).last == 0.8


def test_cells_hold_each_seed_or_their_mean(tmp_path):
    good, failed = read(write_run(tmp_path / "a")), read(write_run(tmp_path / "b", exit=1))
    assert each([good, failed], lambda run: run.last) == "0.800 / -"
    assert mean([good, failed], lambda run: run.last, 1) == "0.8"
    assert mean([failed], lambda run: run.last) == "-"
    assert presets.table_of({"grpo": [good]}).splitlines()[2].startswith("| grpo | 0.800 | 0.800 | 0.900 | 3.50 |")


def test_a_table_takes_the_place_of_the_one_before(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("above\n<!-- table one -->\nold\n<!-- end one -->\nbelow\n")
    table = markdown_table(("a", "b"), [("1", "2")])
    put_table(path, "one", table)
    assert path.read_text() == f"above\n<!-- table one -->\n{table}<!-- end one -->\nbelow\n"
    with pytest.raises(ValueError, match="no place"):
        put_table(path, "two", table)
