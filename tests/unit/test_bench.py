"""`rlsys bench`: what is measured is what is said, and the objective's memory keeps to its bound."""

import functools
import json

import pytest
import torch
from typer.testing import CliRunner

from rlsys import cli
from rlsys.algo import POLICY_LOSSES
from rlsys.bench import BENCHES, objective
from rlsys.bench.objective import MAX_BYTES_PER_TOKEN, make_inputs, measure, peak_bytes
from rlsys.bench.report import machine
from rlsys.errors import CONFIG_ERROR, DONE

SMALL = 100_000  # tokens: enough that what does not grow with them (a few kilobytes) hardly counts


def invoke(*words: str):
    return CliRunner().invoke(cli.app, ["bench", *words])


def test_every_loss_keeps_to_its_bytes_a_token():
    figures = measure(SMALL, repeats=1).figures
    assert {name.partition("/")[2] for name in figures if "/" in name} == POLICY_LOSSES.keys()
    assert figures["bytes_per_token_max"] == max(figures[f"bytes_per_token/{loss}"] for loss in POLICY_LOSSES)
    assert figures["bytes_per_token_max"] <= MAX_BYTES_PER_TOKEN
    assert min(figures[f"bytes_per_token/{loss}"] for loss in POLICY_LOSSES) > 4.0  # the gradient alone
    assert figures["seconds_max"] == max(figures[f"seconds/{loss}"] for loss in POLICY_LOSSES) > 0.0


def test_the_peak_is_what_was_held_at_once():
    def run() -> None:
        first, second = torch.empty(1000), torch.empty(500)  # 6,000 bytes
        del first
        third = torch.empty(600)  # 4,400 bytes
        del second, third

    assert peak_bytes(run) == 6000


def test_the_peak_of_a_backward_pass_is_counted():
    values = torch.ones(1000, requires_grad=True)

    def run() -> None:
        values.square().sum().backward()
        values.grad = None

    # 4,000 for each of the square, kept until the sum is taken, and the gradient; 2 * values on the way back
    assert 8000 <= peak_bytes(run) <= 13_000


def test_measured_tokens_are_the_same_in_every_call():
    first, second = make_inputs(1000), make_inputs(1000)
    assert first.keys() == second.keys()
    for name, value in first.items():
        same = value.starts_S if name == "segments" else value
        other = second[name].starts_S if name == "segments" else second[name]
        assert torch.equal(same, other), name
    assert first["policy_logprobs_T"].shape == (1000,) and 800 <= int(first["mask_T"].sum()) < 1000


def test_measuring_leaves_no_gradient_and_the_threads_as_they_were():
    threads = torch.get_num_threads()
    measure(1000, repeats=1)
    assert torch.get_num_threads() == threads


def test_bench_writes_its_figures_and_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(objective, "measure", functools.partial(measure, 1000, 1))
    path = tmp_path / "objective.json"
    done = invoke("objective", "--json", str(path))
    assert done.exit_code == DONE and "ppo_clip" in done.stdout
    written = json.loads(path.read_text())
    assert written.keys() == {"bench", "figures", "machine"} and written["bench"] == "objective"
    assert all(isinstance(value, float) for value in written["figures"].values())
    assert written["machine"] == machine() and written["machine"]["cores"] >= 1


def test_an_unknown_bench_is_refused_by_naming_those_there_are():
    done = invoke("objectives")
    assert done.exit_code == CONFIG_ERROR
    assert all(name in done.stderr for name in BENCHES)


@pytest.mark.parametrize("place", ["", "no/such/folder/figures.json"])
def test_a_place_that_takes_no_file_is_refused_before_anything_is_measured(tmp_path, monkeypatch, place):
    monkeypatch.setattr(objective, "measure", pytest.fail)
    done = invoke("objective", "--json", str(tmp_path / place))
    assert done.exit_code == CONFIG_ERROR and "--json" in done.stderr
