"""Trackers, the rollout log, the gauges, and the sink before them."""

import io
import json
import math
import threading

import numpy as np
import pyarrow.parquet as pq
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from rlsys.observe import rollout_log as rollout_log_module
from rlsys.observe.append_file import AppendFile
from rlsys.observe.lineage import CommitLog
from rlsys.observe.progress import Progress
from rlsys.observe.ray_metrics import RayGauges, gauge_name
from rlsys.observe.rollout_log import MAX_PENDING, RolloutLog
from rlsys.observe.sink import RunSink
from rlsys.observe.trackers import MetricsFile, TensorBoard, Trackers
from rlsys.records import NOT_SAMPLED, Draw, Prompt, Rollout, RolloutGroup, StopReason, Version

VERSION = Version(incarnation=0, step=3)


def make_group(index=0, members=2, completion="46", content="12+34="):
    prompt = Prompt(draw=Draw(source="sums", index=index, epoch=0), content=content, answer="46")
    codes = [Version(incarnation=0, step=step).code for step in (2, 2, 3)]
    rollouts = [
        Rollout(
            rollout_id=f"{prompt.group_id}/{member}",
            token_ids_T=np.array([5, 6, 7, 8, 9], np.int32),
            loss_mask_T=np.array([False, False, True, True, True]),
            behaviour_logprobs_T=np.array([0, 0, -0.5, -1.0, -1.5], np.float32),
            versions_T=np.array([NOT_SAMPLED, NOT_SAMPLED, *codes], np.int64),
            num_prompt_tokens=2,
            completion=completion,
            stop_reason=StopReason.EOS,
            engine="rollout-0",
            seconds=0.1,
            reward=1.0,
            reward_parts={"right": 1.0},
        )
        for member in range(members)
    ]
    return RolloutGroup(prompt=prompt, rollouts=tuple(rollouts))


def test_each_step_is_one_flat_line_of_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.step(3, VERSION, 1.5, {"actor/pg_loss": float(np.float32(0.25)), "actor/grad_norm": math.nan, "step": 99})
    file.step(4, VERSION.next(), 2.0, {})
    lines = path.read_text().splitlines()  # readable before close
    assert json.loads(lines[0], parse_constant=pytest.fail) == {
        "step": 3,
        "version": "0.3",
        "time_s": 1.5,
        "actor/pg_loss": 0.25,
        "actor/grad_norm": None,
    }
    assert lines[0].startswith('{"step": 3, "version": "0.3", "time_s": 1.5, ')
    assert json.loads(lines[1]) == {"step": 4, "version": "0.4", "time_s": 2.0}
    file.close()


def read_events(folder):
    [path] = folder.iterdir()
    data, events = path.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")  # a record: length, its checksum, bytes, their checksum
        for part, checksum in ((data[:8], data[8:12]), (data[12 : 12 + length], data[12 + length : 16 + length])):
            assert masked_crc32c(part) == int.from_bytes(checksum, "little")
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def read_scalars(folder):
    return [
        (event.step, value.tag, value.simple_value) for event in read_events(folder) for value in event.summary.value
    ]


def test_tensorboard_gets_the_finite_numbers_at_their_step(tmp_path):
    board = TensorBoard(tmp_path / "tensorboard", first_step=3)
    board.step(3, VERSION, 1.5, {"critic/score/mean": 0.5, "actor/grad_norm": math.inf, "lag": np.float32(2)})
    assert board.close() == []
    assert read_scalars(tmp_path / "tensorboard") == [(3, "critic/score/mean", 0.5), (3, "lag", 2.0)]
    version, start, _ = read_events(tmp_path / "tensorboard")
    assert version.file_version == "brain.Event:2"
    # from here on TensorBoard forgets what was written of step 3 and later
    assert (start.step, start.session_log.status) == (3, SessionLog.START)


def test_rollouts_are_written_with_who_sampled_them_and_how_old_they_are(tmp_path):
    log = RolloutLog(tmp_path / "rollouts", rollouts_per_step=4)
    log.write(12, [make_group(), make_group(1, content=({"role": "user", "content": "12+34="},))])
    log.close()
    rows = pq.read_table(tmp_path / "rollouts" / "step_000012.parquet").to_pylist()
    assert rows[0] == {
        "step": 12,
        "rollout_id": "sums:0:0#0/0",
        "prompt": "12+34=",
        "completion": "46",
        "answer": "46",
        "reward": 1.0,
        "shaped_by": 0.0,
        "reward_parts": '{"right": 1.0}',
        "turn_rewards": None,
        "staleness": 10,
        "versions": "0.2 x2, 0.3 x1",
        "num_prompt_tokens": 2,
        "num_sampled_tokens": 3,
        "engine": "rollout-0",
        "stop_reason": "eos",
        "mean_logprob": -1.0,
    }
    assert json.loads(rows[2]["prompt"]) == [{"role": "user", "content": "12+34="}]


def test_sample_is_spread_over_the_groups(tmp_path):
    log = RolloutLog(tmp_path, rollouts_per_step=3)
    log.write(0, [make_group(index) for index in range(6)])
    log.close()
    ids = pq.read_table(tmp_path / "step_000000.parquet")["rollout_id"].to_pylist()
    assert ids == ["sums:0:0#0/0", "sums:0:2#0/0", "sums:0:4#0/0"]


def test_slow_disk_costs_rollouts_and_no_time(tmp_path, monkeypatch):
    disk = threading.Event()
    write_table = rollout_log_module.pq.write_table
    monkeypatch.setattr(rollout_log_module.pq, "write_table", lambda *args: (disk.wait(30), write_table(*args)))
    log = RolloutLog(tmp_path, rollouts_per_step=1)
    for step in range(MAX_PENDING + 5):
        log.write(step, [make_group()])
    disk.set()
    log.close()
    num_written = len(list(tmp_path.glob("step_*.parquet")))
    assert log.num_skipped >= 4 and num_written + log.num_skipped == MAX_PENDING + 5


def test_oldest_rollouts_go_when_the_log_is_full(tmp_path):
    log = RolloutLog(tmp_path, rollouts_per_step=1)
    log.write(0, [make_group()])
    log.close()
    size = (tmp_path / "step_000000.parquet").stat().st_size
    log = RolloutLog(tmp_path, rollouts_per_step=1, max_total_bytes=3 * size + size // 2)
    for step in range(1, 7):
        log.write(step, [make_group()])
    log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step:06d}.parquet" for step in (4, 5, 6)]


def make_sink(tmp_path, **parts):
    terminal, log = io.StringIO(), tmp_path / "log.txt"
    ticks = iter(range(100))
    sink = RunSink(
        trackers=Trackers([MetricsFile(tmp_path / "metrics.jsonl")]),
        progress=Progress(terminal, total_steps=20),
        log=AppendFile(log),
        commits=CommitLog(tmp_path / "commits.jsonl"),
        clock=lambda: float(next(ticks)),
        **parts,
    )
    return sink, terminal, log


def test_sink_hands_everything_on(tmp_path):
    class Gauges:
        def __init__(self):
            self.values = {}

        def set(self, values):
            self.values |= values

    gauges, rollouts = Gauges(), RolloutLog(tmp_path / "rollouts", 1)
    sink, terminal, log = make_sink(tmp_path, gauges=gauges, rollout_log=rollouts)
    sink.live({"buffer/lead": 64.0})
    sink.step(3, VERSION, {"critic/score/mean": 0.5})
    sink.rollouts(2, [make_group()])
    sink.event("rollout-1 is out of service")
    sink.commit(VERSION, ["sums:0:0"])
    sink.close("done: 3 steps")
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row == {"step": 3, "version": "0.3", "time_s": 1.0, "critic/score/mean": 0.5}
    row = json.loads((tmp_path / "commits.jsonl").read_text())
    assert row == {"step": 3, "version": "0.3", "draws": ["sums:0:0"]}
    assert gauges.values == {"buffer/lead": 64.0, "step": 3, "critic/score/mean": 0.5}
    assert (tmp_path / "rollouts" / "step_000002.parquet").exists()
    assert log.read_text().endswith(" rollout-1 is out of service\n")
    lines = terminal.getvalue().splitlines()
    assert "step 3/20 | version 0.3" in lines[0] and "reward 0.500" in lines[0] and "lead 64" in lines[0]
    assert lines[1:] == ["rollout-1 is out of service", "done: 3 steps"]


def test_full_disk_ends_the_rollout_log_and_not_the_run(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rollout_log_module.pq, "write_table", refuse)
    rollouts = RolloutLog(tmp_path / "rollouts", 1)
    sink, _, log = make_sink(tmp_path, rollout_log=rollouts)
    sink.rollouts(1, [make_group()])
    rollouts.close()
    sink.rollouts(2, [make_group()])
    sink.rollouts(3, [make_group()])
    sink.close()
    assert log.read_text().count("sampled rollouts are no longer written: OSError: [Errno 28] No space left") == 1


def test_gauges_are_named_for_prometheus_and_tagged_with_their_run():
    assert gauge_name("idle/trainer") == "rlsys_idle_trainer"
    assert gauge_name("val-core/sums/acc/mean@1") == "rlsys_val_core_sums_acc_mean_1"
    gauges = RayGauges("run-7")
    gauges.set({"idle/trainer": 0.5, "actor/pg_loss": math.nan})
    gauges.set({"idle/trainer": 0.25})
    [gauge] = gauges._gauges.values()
    assert gauge.info["name"] == "rlsys_idle_trainer" and gauge.info["default_tags"] == {"run_id": "run-7"}
