"""Sampled rollouts on disk, for a person to read: ``rollouts/step_000012.parquet``. Written by a thread of its own, so
that the loop that trains never waits for the disk."""

from __future__ import annotations

import json
import queue
import re
import threading
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlsys.observe.plain_json import as_plain_json
from rlsys.records import NOT_SAMPLED, Prompt, Rollout, RolloutGroup, Version, steps_of

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("rollout_id", pa.string()),
        ("prompt", pa.string()),  # text, or messages as JSON
        ("completion", pa.string()),
        ("answer", pa.string()),  # text, or JSON where it is no text
        ("reward", pa.float64()),
        ("shaped_by", pa.float64()),  # what algo.shaping added; the reward less this is what the function gave
        ("reward_parts", pa.string()),  # JSON
        ("turn_rewards", pa.string()),  # JSON; null where the function rewards the whole alone
        ("staleness", pa.int64()),  # steps; of the oldest trained token
        ("versions", pa.string()),  # who sampled it: "0.3 x12, 0.4 x5" is 12 tokens of version 0.3, then 5 of 0.4
        ("num_prompt_tokens", pa.int64()),
        ("num_sampled_tokens", pa.int64()),
        ("engine", pa.string()),
        ("stop_reason", pa.string()),
        ("mean_logprob", pa.float64()),  # nats, over the tokens that may be trained
    ]
)
MAX_PENDING = 8  # steps waiting for the disk; beyond that they are skipped and counted
MAX_TOTAL_BYTES = 1 << 30  # of all files together; beyond that the oldest go
_FILE = re.compile(r"step_\d+\.parquet")


class RolloutLog:
    """Keeps ``rollouts_per_step`` rollouts of each step, spread evenly over its groups.

    Attributes:
        num_skipped: rollouts not written, because the disk was slower than the training.
        failure: why writing ended, None while all is well. The run goes on without its rollout log.
    """

    def __init__(self, folder: Path, rollouts_per_step: int, max_total_bytes: int = MAX_TOTAL_BYTES) -> None:
        self.num_skipped = 0
        self.failure: str | None = None
        self._folder = folder
        self._rollouts_per_step = rollouts_per_step
        self._max_total_bytes = max_total_bytes
        self._pending: queue.Queue[tuple[int, list[tuple[Prompt, Rollout]]] | None] = queue.Queue(MAX_PENDING)
        folder.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._write_all, name="rollout-log", daemon=True)
        self._thread.start()

    def write(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """Keep a sample of the groups. Returns at once. ``step``: the one being trained; staleness counts from it."""
        scored = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
        sample = _spread(scored, self._rollouts_per_step)
        if not sample or self.failure is not None:
            return
        try:
            self._pending.put_nowait((step, sample))
        except queue.Full:
            self.num_skipped += len(sample)

    def close(self, timeout_s: float = 30.0) -> None:
        """Write what is pending; give up after ``timeout_s``."""
        try:
            self._pending.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _write_all(self) -> None:
        while (item := self._pending.get()) is not None:
            if self.failure is not None:
                continue  # the queue is still emptied, so that close() finds room in it
            step, sample = item
            try:
                self._write_file(step, sample)
            except (OSError, pa.ArrowException) as error:  # a full disk must not stop the training
                self.failure = f"{type(error).__name__}: {error}"

    def _write_file(self, step: int, sample: list[tuple[Prompt, Rollout]]) -> None:
        rows = [_row(step, prompt, rollout) for prompt, rollout in sample]
        path = self._folder / f"step_{step:06d}.parquet"
        partial = path.with_name(f".{path.name}.partial")
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial)
        partial.replace(path)
        self._remove_oldest()

    def _remove_oldest(self) -> None:
        files = sorted(path for path in self._folder.iterdir() if _FILE.fullmatch(path.name))
        sizes = [path.stat().st_size for path in files]
        total_bytes = sum(sizes)
        for path, size in list(zip(files, sizes, strict=True))[:-1]:
            if total_bytes <= self._max_total_bytes:
                return
            path.unlink()
            total_bytes -= size


def _spread(rollouts: list[tuple[Prompt, Rollout]], number: int) -> list[tuple[Prompt, Rollout]]:
    """``number`` of the rollouts at even distances, in their order; all of them where there are fewer."""
    number = min(number, len(rollouts))
    return [rollouts[index * len(rollouts) // number] for index in range(number)]


def _row(step: int, prompt: Prompt, rollout: Rollout) -> dict[str, Any]:
    trained = rollout.loss_mask_T & (rollout.versions_T != NOT_SAMPLED)
    oldest = int(steps_of(rollout.versions_T[trained]).min()) if trained.any() else None
    return {
        "step": step,
        "rollout_id": rollout.rollout_id,
        "prompt": _text(prompt.content),
        "completion": rollout.completion,
        "answer": _text(prompt.answer),
        "reward": rollout.reward,
        "shaped_by": rollout.shaped_by,
        "reward_parts": _text(rollout.reward_parts),
        "turn_rewards": _text(rollout.turn_rewards),
        "staleness": None if oldest is None else step - oldest,
        "versions": _describe_versions(rollout),
        "num_prompt_tokens": rollout.num_prompt_tokens,
        "num_sampled_tokens": rollout.num_sampled_tokens,
        "engine": rollout.engine,
        "stop_reason": rollout.stop_reason.value,
        "mean_logprob": float(rollout.behaviour_logprobs_T[trained].mean()) if oldest is not None else None,
    }


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(as_plain_json(value), ensure_ascii=False)


def _describe_versions(rollout: Rollout) -> str:
    sampled = [int(code) for code in rollout.versions_T if code != NOT_SAMPLED]
    return ", ".join(f"{Version.from_code(code)} x{len(list(run))}" for code, run in groupby(sampled))
