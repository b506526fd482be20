"""The learner: one Ray actor per process, driven as one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from rlsys.actors.remote import answer
from rlsys.actors.sender import Spot, own_spot
from rlsys.batch.tensors import Batch, RankBatch
from rlsys.errors import CheckpointFailed, Diverged, LearnerFailed
from rlsys.records import Probe, StepReport, TensorEntry, Version, WeightVersion
from rlsys.train.checkpoint import Written
from rlsys.weights.probe import probe_sequences
from rlsys.weights.tcp import Source, free_port

WRITTEN_POLL_S = 0.2  # between two looks at the parts of a checkpoint


class LearnerActor:
    """A process of the learner. A plain actor: calls run one after another, in the order in which they were sent.

    Args:
        adapters_only: whether versions are the adapters alone.
    """

    def __init__(self, rank: int, arguments: dict[str, Any], engine_dtype: str, adapters_only: bool) -> None:
        from rlsys.train.learner import LearnerRank

        self._rank, self._engine_dtype, self._adapters_only = rank, engine_dtype, adapters_only
        self._learner = LearnerRank(**arguments)
        self._probe_ids: tuple[Any, ...] = ()
        self._segments: list[str] = []
        self._server: Any = None
        self._writers: dict[str, Any] = {}  # kept: mapping a recycled segment anew costs as much as filling it

    def __repr__(self) -> str:
        return f"LearnerRank({self._rank})"

    def address(self) -> tuple[str, int]:
        """Where the ranks can meet: this node, and a port that is free now. Imports are done by then."""
        return ray.util.get_node_ip_address(), free_port()

    def start(self, world_size: int, master_addr: str, master_port: int, seed: int, checkpoint: str | None) -> None:
        self._learner.start(self._rank, world_size, master_addr, master_port, checkpoint)
        self._probe_ids = probe_sequences(self._learner.vocab_size, seed)

    def segments(self, run: str) -> list[str]:
        """Paths of the run's weight segments on this machine; they are this process's, and go with it."""
        from rlsys.weights.pool import NUM_SEGMENTS
        from rlsys.weights.segment import own_segments

        self._segments = own_segments(run, "learner", NUM_SEGMENTS)
        return self._segments

    def serve_segments(self) -> Source:
        """Hand the segments out to other machines, as long as this process lives."""
        from rlsys.weights.tcp import SegmentServer

        self._server = SegmentServer(ray.util.get_node_ip_address(), self._segments)
        return self._server.source

    def spot(self) -> Spot:
        """Where versions can be sent from."""
        return own_spot()

    def remove_segments(self, run: str) -> None:
        from rlsys.weights.segment import remove_segments

        remove_segments(run)

    def step(self, batch: RankBatch) -> dict[str, float]:
        return self._learner.step(batch)

    def export(self, segment: str) -> tuple[tuple[TensorEntry, ...], Probe]:
        """Write the weights (rank 0), and answer the probe (every rank: a collective under ZeRO-3 and tensor
        parallel)."""
        writer = self._writer(segment) if self._rank == 0 else None
        write = writer.write if writer is not None else _write_nothing
        self._learner.export(write, adapters_only=self._adapters_only)
        entries = writer.finish() if writer is not None else ()
        logprobs = self._learner.probe_logprobs(self._probe_ids)
        return entries, Probe(token_ids=self._probe_ids, logprobs=tuple(logprobs))

    def save(self, folder: str) -> None:
        self._learner.save_hf(folder)

    def save_adapter(self, folder: str) -> None:
        self._learner.save_adapter(folder)

    def save_checkpoint(self, folder: str) -> None:
        self._learner.save_checkpoint(folder)

    def checkpoint_written(self) -> Written | None:
        return self._learner.checkpoint_written()

    def _writer(self, segment: str) -> Any:
        import torch

        from rlsys.weights.segment import SegmentWriter

        if segment not in self._writers:
            self._writers[segment] = SegmentWriter(segment, getattr(torch, self._engine_dtype))
        return self._writers[segment]


class RayLearner:
    """The controller's handle on all ranks.

    Args:
        actors: one per process, in order.
        version: of the weights that it starts with.
        processes: so many in a row share a data-parallel rank, and are handed the same microbatches.
    """

    def __init__(self, actors: Sequence[Any], version: Version, *, processes: int = 1) -> None:
        self._actors, self._processes = list(actors), processes
        self._version = self._last_good = version
        self._probe: Probe | None = None

    async def start(self, seed: int, checkpoint: str | None) -> None:
        """Imports first, on every rank: a rank that still imports when the others meet makes them time out.

        ``checkpoint``: folder of ``save_checkpoint`` to go on from; None starts from the model.
        """
        addresses = await self._all("import", [actor.address.remote() for actor in self._actors])
        host, port = addresses[0]
        world_size = len(self._actors)
        starts = [actor.start.remote(world_size, host, port, seed, checkpoint) for actor in self._actors]
        await self._all("start", starts)

    async def segments(self, run: str) -> list[str]:
        """Where versions are written: segments on rank 0's machine."""
        return await answer(self._actors[0].segments.remote(run), "learner-0", LearnerFailed)

    async def serve_segments(self) -> Source:
        """Where other machines get rank 0's segments."""
        return await answer(self._actors[0].serve_segments.remote(), "learner-0", LearnerFailed)

    async def spot(self) -> Spot:
        """Rank 0's machine, where the segments are, and its GPU."""
        return await answer(self._actors[0].spot.remote(), "learner-0", LearnerFailed)

    async def stop(self, run: str) -> None:
        await answer(self._actors[0].remove_segments.remote(run), "learner-0", LearnerFailed)

    async def step(self, batch: Batch) -> StepReport:
        parts = [batch.for_rank(index // self._processes) for index in range(len(self._actors))]
        metrics = await self._all(
            "train", [actor.step.remote(part) for actor, part in zip(self._actors, parts, strict=True)]
        )
        self._version = self._version.next()
        return StepReport(version=self._version, metrics=metrics[0])

    async def export(self, segment: str, version: Version) -> WeightVersion:
        entries, probe = (await self._all("export", [actor.export.remote(segment) for actor in self._actors]))[0]
        if not all(np.isfinite(logprobs).all() for logprobs in probe.logprobs):
            raise Diverged("the log-probability of a fixed sequence", version.step, str(self._last_good))
        self._last_good = version
        previous, self._probe = self._probe, probe
        return WeightVersion(version=version, segment=segment, tensors=entries, probe=probe, previous_probe=previous)

    async def save(self, folder: str) -> None:
        await self._all("save", [actor.save.remote(folder) for actor in self._actors])

    async def save_adapter(self, folder: str) -> None:
        """What there is of adapters by themselves."""
        await self._all("save the adapter", [actor.save_adapter.remote(folder) for actor in self._actors])

    async def save_checkpoint(self, folder: str) -> None:
        """Take a copy of the learner's state, and begin to write it; ``checkpoint_written`` waits for the end."""
        await self._all("save a checkpoint", [actor.save_checkpoint.remote(folder) for actor in self._actors])

    async def checkpoint_written(self) -> None:
        """Wait until every rank has written its part, or given up: nothing is written any more. A rank is asked between
        two steps, so that the answer may come as late as the end of the one under way.

        Raises:
            CheckpointFailed: one of them could not.
        """
        while True:
            parts = await self._all("write a checkpoint", [actor.checkpoint_written.remote() for actor in self._actors])
            if None not in parts:
                break
            await asyncio.sleep(WRITTEN_POLL_S)
        for rank, part in enumerate(parts):
            if part.failure:
                raise CheckpointFailed(f"learner-{rank} could not write its part: {part.failure}. Free space there.")

    async def _all(self, act: str, calls: Sequence[Any]) -> list[Any]:
        """Answers of every rank. A Diverged of any rank is what is raised; else the first failure, which the others
        followed from."""
        who = [f"learner-{rank} ({act})" for rank in range(len(calls))]
        answers = await asyncio.gather(
            *(answer(call, name, LearnerFailed) for call, name in zip(calls, who, strict=True)), return_exceptions=True
        )
        failures = [failure for failure in answers if isinstance(failure, BaseException)]
        for failure in sorted(failures, key=lambda failure: not isinstance(failure, Diverged)):
            raise failure
        return answers


def _write_nothing(bucket: Any) -> None:
    """Ranks above 0 take part in the gathering only."""
