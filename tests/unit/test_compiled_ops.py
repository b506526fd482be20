"""Compiling DeepSpeed's optimizers: one process at a time, with an end, and no lock of a dead process in the way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rlsys.errors import ConfigError, WaitTimeout
from rlsys.train import compiled_ops
from rlsys.train.compiled_ops import check_can_compile, load_op

OP = "CPUAdamBuilder"


def test_a_lock_counts_as_long_as_a_process_has_it_open(tmp_path):
    lock = tmp_path / "lock"
    assert not compiled_ops._is_held(lock)
    with open(lock, "w"):
        assert compiled_ops._is_held(lock)
    assert not compiled_ops._is_held(lock)


def test_a_second_process_waits_for_the_first_and_not_for_ever(tmp_path):
    folder = tmp_path / "op"
    code = (
        "import sys, time; from pathlib import Path; from rlsys.train.compiled_ops import _alone\n"
        "with _alone(Path(sys.argv[1]), 0.0, 0.0): print('in', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        second = compiled_ops._alone(folder, time.monotonic() + 0.3, 0.3)
        with pytest.raises(WaitTimeout, match="another process that compiles op"), second:
            pass
    finally:
        other.kill()
        other.wait()
    with compiled_ops._alone(folder, time.monotonic(), 0.3):  # a dead process holds nothing
        pass


def test_a_build_beyond_its_deadline_ends_and_leaves_no_lock(tmp_path):
    (tmp_path / "lock").touch()
    with pytest.raises(WaitTimeout, match="the compiler of DeepSpeed's"):
        compiled_ops._build(OP, "cpu", tmp_path, time.monotonic(), 0.0)
    assert not (tmp_path / "lock").exists()


def test_a_machine_without_a_compiler_is_told_before_anything_starts(monkeypatch, tmp_path):
    check_can_compile("train.offload=optimizer")
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    with pytest.raises(ConfigError) as caught:
        check_can_compile("train.offload=optimizer")
    assert caught.value.what == "train.offload=optimizer" and "g++" in caught.value.got


@pytest.fixture(scope="module")
def built() -> Path:
    """Folder of the compiled op, which takes a minute where it was never built on this machine."""
    load_op(OP, device="cpu", deadline_s=600.0)
    return compiled_ops._folder(compiled_ops._builder(OP, "cpu"))


@pytest.mark.engines
def test_a_lock_that_a_killed_build_left_holds_up_nobody(built, monkeypatch, tmp_path):
    shutil.copytree(built, tmp_path / built.name)
    (tmp_path / built.name / "built_for.json").unlink()  # as if it had not come to its end
    (tmp_path / built.name / "lock").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    load_op(OP, device="cpu", deadline_s=600.0)
    assert sorted(path.name for path in (tmp_path / built.name).iterdir() if "lock" in path.name) == []
    assert (tmp_path / built.name / "built_for.json").exists()


@pytest.mark.engines
def test_an_op_that_was_built_for_another_machine_is_built_again(built, monkeypatch, tmp_path):
    shutil.copytree(built, tmp_path / built.name)
    (tmp_path / built.name / "built_for.json").write_text('{"torch": "1.0"}')
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(ConfigError) as caught:
        load_op(OP, device="cpu", deadline_s=600.0)
    assert caught.value.what == "train.offload" and "cpu_adam does not compile here" in caught.value.got
    assert "/bin/false" in caught.value.got  # what the compiler said
    assert not (tmp_path / built.name / "cpu_adam.so").exists()


@pytest.mark.engines
def test_the_compiled_adam_is_the_one_of_torch(built):
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(1000)) for _ in range(2))
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.1}
    compiled, plain = DeepSpeedCPUAdam([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for _ in range(5):
        ours.grad = torch.randn(1000)
        theirs.grad = ours.grad.clone()
        compiled.step()
        plain.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert os.environ["DS_ACCELERATOR"] == "cpu"
