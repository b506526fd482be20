"""Whether a run fits into shared memory and onto the disk, by numbers that can be worked out by hand."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from rlsys.config.load import apply_overrides
from rlsys.config.presets import resolve
from rlsys.config.schema import Config, TrainSection
from rlsys.errors import ConfigError
from rlsys.plan import facts, space
from rlsys.plan.space import check_space, checkpoint_bytes, count_parameters, in_units, segment_bytes

MIB = 1 << 20
TINY_PARAMETERS = 804_992


def config_of(tmp_path: Path, *overrides: str) -> Config:
    keys = ["data.task={name: reversed_sum}", f"run.root={tmp_path}/runs", "run.name=a", *overrides]
    return resolve(apply_overrides(Config(), keys))


@pytest.fixture
def free(monkeypatch):
    """Set the free bytes of shared memory, and of every disk."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(space, "stale_segments", lambda: ())  # whatever lies there on this machine

    def set_free(shm: int, disk: int) -> None:
        def usage(path):
            return SimpleNamespace(free=shm if Path(path) == space.SHM_FOLDER else disk)

        monkeypatch.setattr(shutil, "disk_usage", usage)

    return set_free


def refused(config: Config) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_space(config)
    error = caught.value
    assert all((error.what, error.got, error.wanted, error.remedy)), str(error)
    return error


# --- parameters


def test_the_embedded_model_is_counted_without_making_it():
    state = torch.random.get_rng_state()
    assert count_parameters("tiny") == TINY_PARAMETERS
    assert torch.equal(torch.random.get_rng_state(), state)


def test_parameters_are_counted_from_headers_over_all_files_of_the_index(tmp_path):
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros((), dtype=torch.bfloat16)}, tmp_path / "one.safetensors")
    save_file({"c": torch.zeros(7)}, tmp_path / "two.safetensors", metadata={"format": "pt"})
    save_file({"d": torch.zeros(100)}, tmp_path / "consolidated.safetensors")  # the same weights once more
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert count_parameters(str(tmp_path)) == 3 * 5 + 1 + 7


def test_without_an_index_the_file_of_the_usual_name_is_the_model(tmp_path):
    save_file({"d": torch.zeros(100)}, tmp_path / "consolidated.safetensors")
    assert count_parameters(str(tmp_path)) == 100
    save_file({"a": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    assert count_parameters(str(tmp_path)) == 16


@pytest.mark.parametrize(("key", "dtype", "parameters"), [("torch_dtype", "bfloat16", 500), ("dtype", "float32", 250)])
def test_weights_without_headers_are_counted_by_their_size(tmp_path, key, dtype, parameters):
    (tmp_path / "config.json").write_text(json.dumps({key: dtype}))
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(bytes(600))
    (tmp_path / "pytorch_model-00002-of-00002.bin").write_bytes(bytes(400))
    assert count_parameters(str(tmp_path)) == parameters


@pytest.mark.parametrize(
    ("damage", "got"),
    [
        (lambda data: data[:-1], "cut short"),
        (lambda data: data[:20], "cut short"),
        (lambda data: b"", "cut short"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "cut short"),  # a pointer instead of the file
        (lambda data: data[:8] + b"?" + data[9:], "JSONDecodeError"),
    ],
)
def test_a_broken_weight_file_is_refused_by_name(tmp_path, damage, got):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4, 4)}, file)
    file.write_bytes(damage(file.read_bytes()))
    error = refused(config_of(tmp_path, f"model.path={tmp_path}"))
    assert error.what == "model.path" and got in error.got and str(file) in error.got


def test_a_weight_file_that_is_in_the_index_and_not_in_the_folder_is_refused(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "one.safetensors"}}')
    assert "one.safetensors: FileNotFoundError" in refused(config_of(tmp_path, f"model.path={tmp_path}")).got
    index.write_text('{"weights": {}}')
    assert "KeyError" in refused(config_of(tmp_path, f"model.path={tmp_path}")).got


# --- what a parameter takes


def test_a_segment_grows_in_steps_of_four_mib():
    assert segment_bytes(MIB, "float32") == 4 * MIB
    assert segment_bytes(MIB + 1, "float32") == 8 * MIB
    assert segment_bytes(MIB, "bfloat16") == 4 * MIB
    assert segment_bytes(10 * MIB, "bfloat16") == 20 * MIB


@pytest.mark.parametrize(
    ("zero_stage", "is_bf16", "bytes_a_parameter"),  # as DeepSpeed's own files were measured
    [(0, False, 12), (1, False, 16), (2, False, 16), (3, False, 12), (0, True, 14), (2, True, 14), (3, True, 12)],
)
def test_a_checkpoint_holds_weights_master_copy_and_moments(zero_stage, is_bf16, bytes_a_parameter):
    train = TrainSection(zero_stage=zero_stage, dtype="bfloat16" if is_bf16 else "float32")
    assert checkpoint_bytes(1000, train) == 1000 * bytes_a_parameter


def test_sizes_are_told_in_units_that_fit():
    assert (in_units(3 << 29), in_units(12 * MIB), in_units(5 << 40)) == ("1.50 GiB", "12.0 MiB", "5,120.00 GiB")


# --- what is there


def test_two_segments_have_to_fit_into_shared_memory(tmp_path, free):
    free(shm=8 * MIB, disk=1 << 40)
    check_space(config_of(tmp_path))
    free(shm=8 * MIB - 1, disk=1 << 40)
    error = refused(config_of(tmp_path))
    assert error.what == "shared memory (/dev/shm)" and error.got == "8.0 MiB free"
    assert error.wanted == "8.0 MiB: 2 weight versions of 804,992 parameters in float32"
    assert "model.dtype=bfloat16" in error.remedy and "--shm-size" in error.remedy


def test_what_a_killed_run_left_in_shared_memory_counts_as_free(tmp_path, free, monkeypatch):
    left = tmp_path / "segment"
    left.write_bytes(bytes(3 * MIB))
    monkeypatch.setattr(space, "stale_segments", lambda: (left,))
    free(shm=5 * MIB, disk=1 << 40)
    check_space(config_of(tmp_path))
    free(shm=5 * MIB - 1, disk=1 << 40)
    refused(config_of(tmp_path))


@pytest.mark.parametrize("by", ["ray.address=auto", "RAY_ADDRESS"])
def test_shared_memory_is_not_looked_at_where_a_cluster_chooses_the_machine(tmp_path, free, monkeypatch, by):
    free(shm=0, disk=1 << 40)
    if by == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    config = config_of(tmp_path, *(() if by == "RAY_ADDRESS" else (by,)))
    assert "on the machine that the cluster chooses" in facts.of_space(config, check_space(config))


def test_one_checkpoint_more_than_are_kept_and_the_model_have_to_fit_onto_the_disk(tmp_path, free):
    needed = (3 * 12 + 4) * TINY_PARAMETERS  # keep=2
    free(shm=1 << 40, disk=needed)
    check_space(config_of(tmp_path))
    free(shm=1 << 40, disk=needed - 1)
    error = refused(config_of(tmp_path))
    assert error.what == f"run.root={tmp_path}/runs" and error.got == "30.7 MiB free on its disk"
    assert (
        "30.7 MiB: 3 checkpoints (checkpoint.keep + 1) of 9.2 MiB, and 3.1 MiB for the exported model" in error.wanted
    )
    assert "checkpoint.keep" in error.remedy
    check_space(config_of(tmp_path, "checkpoint.keep=1"))


def test_what_the_run_holds_already_counts_as_free(tmp_path, free):
    needed = (3 * 12 + 4) * TINY_PARAMETERS
    for part in ("checkpoints/step_10/learner", "model"):
        (tmp_path / "runs" / "a" / part).mkdir(parents=True)
        (tmp_path / "runs" / "a" / part / "weights").write_bytes(bytes(MIB))
    free(shm=1 << 40, disk=needed - 2 * MIB)
    check_space(config_of(tmp_path))
    free(shm=1 << 40, disk=needed - 2 * MIB - 1)
    refused(config_of(tmp_path))


def test_the_run_folder_is_made_nowhere_and_can_be_made(tmp_path, monkeypatch):
    check_space(config_of(tmp_path, f"run.root={tmp_path}/some/where"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert refused(config_of(tmp_path, f"run.root={tmp_path}/file/runs")).got == f"{tmp_path}/file is a file"
    monkeypatch.setattr(space.os, "access", lambda path, mode: False)  # root may write everywhere
    assert "cannot be written to" in refused(config_of(tmp_path)).got


def test_the_numbers_are_told(tmp_path, free):
    free(shm=1 << 30, disk=1 << 40)
    config = config_of(tmp_path)
    assert facts.of_space(config, check_space(config)) == (
        "space: 804,992 parameters; shared memory: 8.0 MiB for the weights, of 1.00 GiB free; disk: at most 30.7 MiB "
        "for 3 checkpoints and the exported model, of 1,024.00 GiB free"
    )
