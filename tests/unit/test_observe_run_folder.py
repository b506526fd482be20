"""The run's folder, and where output goes that is not ours."""

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import yaml

from rlsys.observe.run_folder import RunFolder, write_atomically

REPOSITORY = Path(__file__).parents[2]


def test_folder_has_its_files_under_stable_names(tmp_path):
    folder = RunFolder(tmp_path / "runs", "first")
    assert folder.path == tmp_path / "runs" / "first" and folder.path.is_dir()
    paths = [folder.config_path, folder.metrics_path, folder.result_path, folder.log_path, folder.rollouts_path]
    names = ["config.yaml", "metrics.jsonl", "result.json", "log.txt", "rollouts"]
    assert [path.relative_to(folder.path).as_posix() for path in paths] == names


def test_config_is_read_back_as_it_was(tmp_path):
    config = {"run": {"name": "first", "steps": 20}, "train": {"betas": [0.9, 0.999], "deepspeed": {}}}
    folder = RunFolder(tmp_path, "first")
    folder.write_config(config)
    assert yaml.safe_load(folder.config_path.read_text()) == config


def test_result_is_strict_json_and_keeps_its_keys(tmp_path):
    folder = RunFolder(tmp_path, "first")
    folder.write_result({"idle/trainer": np.float32(0.5), "loss": math.nan, "steps": 20, "exit": "done"})
    assert json.loads(folder.result_path.read_text(), parse_constant=pytest.fail) == {
        "idle/trainer": 0.5,
        "loss": None,
        "steps": 20,
        "exit": "done",
    }


def test_file_is_old_or_new_but_never_half(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_atomically(path, "old")

    def crash(fd):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_log_is_continued_line_by_line(tmp_path):
    folder = RunFolder(tmp_path, "first")
    for word in ("one", "two"):
        log = folder.open_log()
        log.write(word.encode() + b"\n")
        assert folder.log_path.read_text().endswith(word + "\n")  # there before close
        log.close()
    assert folder.log_path.read_text() == "one\ntwo\n"


def run_script(tmp_path, body, **pipes):
    script = "import ctypes, os, subprocess, sys\nfrom pathlib import Path\n"
    script += "from rlsys.observe.run_folder import redirect_library_output\nlog = Path(sys.argv[1])\n"
    script += textwrap.dedent(body)
    return subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "log.txt")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        **pipes,
    )


def test_noise_of_python_c_and_child_processes_goes_to_the_log(tmp_path):
    done = run_script(
        tmp_path,
        """
        print("before")
        with redirect_library_output(log) as terminal:
            print("from python")
            ctypes.CDLL(None).printf(b"from C, buffered\\n")
            os.write(2, b"from C++ on standard error\\n")
            print("without an end", end="")
            subprocess.run(["echo", "from a child"])
            terminal.write("progress\\n")
        print("after")
        """,
    )
    assert done.stdout == "before\nprogress\nafter\n" and done.stderr == ""
    log = (tmp_path / "log.txt").read_text()
    assert set(log.splitlines()) == {
        "from python",
        "from C, buffered",
        "from C++ on standard error",
        "from a child",
        "without an end",
    }


def test_output_is_back_after_an_error(tmp_path):
    done = run_script(
        tmp_path,
        """
        with redirect_library_output(log) as terminal:
            print("noise")
            raise RuntimeError("it failed")
        """,
    )
    assert "RuntimeError: it failed" in done.stderr
    assert (tmp_path / "log.txt").read_text() == "noise\n"


def test_terminal_without_the_characters_is_no_error(tmp_path):
    done = run_script(
        tmp_path,
        "with redirect_library_output(log) as terminal:\n    terminal.write('reward \\u2265 0.9\\n')\n",
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.stdout == "reward ? 0.9\n"


def test_printing_on_a_full_disk_is_no_error(tmp_path):
    done = run_script(
        tmp_path,
        """
        import resource
        with redirect_library_output(log) as terminal:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            print("noise", flush=True)
            print("noise", file=sys.stderr)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            print("noise again")
        print("after")
        """,
    )
    assert done.stdout == "after\n" and done.stderr == ""
    assert (tmp_path / "log.txt").read_text() == "noise again\n"
