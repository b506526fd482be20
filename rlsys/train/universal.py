"""A learner's state in a form that does not depend on how it was spread: DeepSpeed's universal checkpoint, every
parameter whole, with its moments. Its converter runs in a process of its own:

    python -m rlsys.train.universal SAVED OUT

DeepSpeed converts between any numbers of ranks and any tensor parallelism, but apart for ZeRO 1 and 2 and for ZeRO 3,
and not without ZeRO. The form is the same for all of them; what is missing to go from each to each is added here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rlsys.train import parallel
from rlsys.train.checkpoint import DEEPSPEED_TAG, UNIVERSAL_TAG, rank_path, saved_layout

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's
_ZERO, _OPTIMIZER, _STEP = "zero", "optimizer_state.pt", "step.pt"
_MAX_WORKERS = 4


def to_universal(saved: Path, out: Path, num_workers: int) -> None:
    """Write the universal form of the learner in ``saved`` into ``out``, a new folder, with what is kept beside it.

    Args:
        num_workers: processes, where more than one; each holds one rank's part of the state.
    """
    parallel.load_deepspeed("cpu")
    from deepspeed.checkpoint import ds_to_universal

    layout = saved_layout(saved)
    out.mkdir(parents=True)
    for path in saved.iterdir():
        if path.is_file():
            shutil.copyfile(path, out / path.name)
    arguments = argparse.Namespace(
        input_folder=str(saved / DEEPSPEED_TAG),
        output_folder=str(out / UNIVERSAL_TAG),
        num_extract_workers=num_workers,
        num_merge_workers=num_workers,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # what tensor parallel would have said of how it cuts
    )
    if layout.zero_stage == 0:
        _convert_without_zero(ds_to_universal, arguments, saved, layout.tensor_parallel)
    else:
        ds_to_universal.main(arguments)
    _complete(out / UNIVERSAL_TAG, layout.tensor_parallel)


def _convert_without_zero(converter: ModuleType, arguments: argparse.Namespace, saved: Path, num_parts: int) -> None:
    """Without ZeRO a rank's file has its part of the model and of the optimizer whole."""
    out, slices = Path(arguments.output_folder), Path(arguments.output_folder) / "tmp"
    shapes: dict[str, list[torch.Size]] = {}
    for part in range(num_parts):
        name_of_file = f"mp_rank_{part:02d}_model_states.pt"
        state = torch.load(saved / DEEPSPEED_TAG / name_of_file, map_location="cpu", weights_only=False)
        names = torch.load(rank_path(saved, part), weights_only=True)["optimized"]
        module, optimizer = state.pop("module"), state.pop("optimizer")
        for index, name in enumerate(names):
            shapes.setdefault(name, []).append(module[name].shape)
            folder = slices / name / str(part)
            folder.mkdir(parents=True)
            for key, value in {"fp32": module[name], **optimizer["state"].get(index, {})}.items():
                torch.save(value if key == "step" else value.flatten().clone(), folder / f"{key}.00")
        torch.save(state, out / name_of_file)
    converter._merge_tp_slice_files(
        arguments, state.get("universal_checkpoint_info", {}), num_parts, shapes, str(slices)
    )
    torch.save({"param_groups": optimizer["param_groups"]}, out / _ZERO / _OPTIMIZER)
    shutil.rmtree(slices)


def _complete(folder: Path, num_parts: int) -> None:
    """ZeRO 1 and 2 want the optimizer's step beside every parameter, and a version; ZeRO 3 wants the step in the
    optimizer's state. Each has its own name for the files of counters and schedule."""
    import deepspeed

    path = folder / _ZERO / _OPTIMIZER
    state: dict[str, Any] = torch.load(path, weights_only=False)
    found = next((folder / _ZERO).rglob(_STEP), None)
    of_optimizer = state.get("optimizer_state_dict", {}).get("state", {}).get(0, {})
    step = torch.load(found, weights_only=False) if found else of_optimizer.get("step", torch.tensor(0.0))
    state["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": state["param_groups"]}
    torch.save({"ds_version": deepspeed.__version__, **state}, path)
    for moment in (folder / _ZERO).rglob(f"{MOMENTS[0]}.pt"):
        torch.save(step, moment.with_name(_STEP))
    for part in range(num_parts):
        plain = folder / f"mp_rank_{part:02d}_model_states.pt"
        of_zero3 = folder / f"zero_pp_rank_0_{plain.name}"
        source, missing = (plain, of_zero3) if plain.exists() else (of_zero3, plain)
        shutil.copyfile(source, missing)
        if source == of_zero3 and num_parts == 1:
            _give_shapes(folder / _ZERO, torch.load(source, weights_only=False)["param_shapes"])


def _give_shapes(folder: Path, shapes: Sequence[Mapping[str, torch.Size]]) -> None:
    """From ZeRO 3 without tensor parallel everything comes flat, which ZeRO 3 alone can read."""
    for name, shape in (item for group in shapes for item in group.items()):
        for key in ("fp32", *MOMENTS):
            path = folder / name / f"{key}.pt"
            torch.save({"param": torch.load(path, weights_only=False).view(shape)}, path)


def load_universal(engine: Any, folder: Path | str, zero_stage: int) -> None:
    """Take up what ``to_universal`` has written, into a new engine of any layout. A collective."""
    engine._config.load_universal_checkpoint = True  # DeepSpeed asks for it at loading only
    try:
        if zero_stage == 0:
            engine._load_checkpoint(str(folder), UNIVERSAL_TAG, load_optimizer_states=False)  # counters and schedule
            _load_without_zero(engine, Path(folder) / UNIVERSAL_TAG / _ZERO)
        else:
            engine.load_checkpoint(str(folder), tag=UNIVERSAL_TAG)
    finally:
        engine._config.load_universal_checkpoint = False


def _load_without_zero(engine: Any, folder: Path) -> None:
    optimizer = engine.optimizer
    for name, parameter in _optimized(engine):
        parameter.data.copy_(_part(engine, folder / name, "fp32", parameter))
        if (folder / name / _STEP).exists():
            moments = {key: _part(engine, folder / name, key, parameter).clone() for key in MOMENTS}
            optimizer.state[parameter] = {
                "step": torch.load(folder / name / _STEP, weights_only=False),
                **{key: moment.to(parameter.device) for key, moment in moments.items()},
            }
    saved = torch.load(folder / _OPTIMIZER, weights_only=False)["param_groups"]
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        group.update({key: value for key, value in values.items() if key != "params"})


def _part(engine: Any, folder: Path, key: str, parameter: Tensor) -> Tensor:
    """What this process holds of a parameter or a moment of it, in its shape."""
    from deepspeed.checkpoint.universal_checkpoint import _resolve_autotp_partition

    saved = torch.load(folder / f"{key}.pt", map_location="cpu", weights_only=False)
    whole: Tensor = saved["param"]
    if getattr(engine, "mpu", None) is not None:
        number, count = engine.mpu.get_tensor_model_parallel_rank(), engine.mpu.get_tensor_model_parallel_world_size()
        part = _resolve_autotp_partition(parameter, saved, whole, number, count, state_key=key)
        whole = whole if part is None else part
    return whole.reshape(parameter.shape)


def _optimized(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """The module's parameters that the optimizer has, in its order, by name; without ZeRO, and in float32, all that it
    has."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    for group in engine.optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in names:
                yield names[id(parameter)], parameter


def optimized_names(engine: Any) -> list[str]:
    return [name for name, _ in _optimized(engine)]


if __name__ == "__main__":
    to_universal(Path(sys.argv[1]), Path(sys.argv[2]), max(1, min(_MAX_WORKERS, (os.cpu_count() or 1) // 2)))
