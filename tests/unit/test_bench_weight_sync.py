"""`rlsys bench weight-sync`: every figure is one of what was carried, and nothing of it is left behind. The engines'
part is measured by the bench itself; what it stands on, engines that take versions over, is tested with the engines."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest

from rlsys.bench import BENCHES
from rlsys.bench.weight_sync import PLANS, RUN, _surroundings, _table, _through_files, transport
from rlsys.bench.weight_sync_engines import _cpu_s, _status_mb
from rlsys.models.tiny.model import make_random_model, make_tokenizer
from rlsys.weights.segment import SHM_FOLDER

PARTS = ("export_s", "verify_s", "copy_out_s")


@pytest.fixture(scope="module")
def found():
    with _surroundings() as folder:
        return transport(_through_files(make_random_model(make_tokenizer()), folder / "tiny"), repeats=2)


def test_a_channel_costs_all_of_its_parts_over_one_memory_copy(found):
    assert min(found.values()) > 0.0
    shm = sum(found[part] for part in PARTS)
    assert found["shm/transport_to_memcpy"] == pytest.approx(shm / found["memcpy_s"])
    assert found["tcp/transport_to_memcpy"] == pytest.approx((shm + found["tcp_s"]) / found["memcpy_s"])
    cast = sum(found[f"bfloat16/{part}"] for part in PARTS)
    assert found["bfloat16/transport_to_memcpy"] == pytest.approx(cast / found["memcpy_s"])
    assert found["megabytes"] == pytest.approx(3.22, abs=0.01)  # 0.8 million float32 weights, the tied head once


def test_nothing_is_left_in_shared_memory_or_in_the_environment(found):
    assert not list(SHM_FOLDER.glob(f"*{RUN}*"))
    before = dict(os.environ)
    with _surroundings() as folder:
        assert folder.is_dir() and os.environ["TORCHDYNAMO_DISABLE"] == "1"
    assert dict(os.environ) == before and not folder.exists()


def test_the_table_names_every_model_and_number_of_engines(found):
    figures = {f"{size}/{name}": value for size in PLANS for name, value in found.items()}
    for size, plan in PLANS.items():
        for num in plan.engines:
            for channel in ("shm", "tcp"):
                named = {"pause_ms": 21.0, "load_ms": 1234.0, "paused_share": 0.021}
                figures |= {f"{size}/{num}_engines/{channel}/{name}": value for name, value in named.items()}
        figures |= {f"{size}/{name}": 7.0 for name in ("pack_cpu_s", "engine_rest_mb", "engine_peak_mb")}
    lines = _table(figures).splitlines()
    assert sum("2.1%" in line and "1234ms" in line for line in lines) == sum(len(p.engines) for p in PLANS.values())
    assert "weight-sync" in BENCHES
    del figures["m135/4_engines/shm/pause_ms"]
    assert "4  left out: wants 18 GB" in _table(figures)


def test_engines_that_memory_does_not_hold_are_left_out():
    plan = PLANS["m135"]
    assert list(plan.within(3.5 * plan.engine_mb).engines) == [1, 2, 3]
    assert list(plan.within(0.0).engines) == [1]  # it is tried: the estimate may be wrong
    assert plan.within(1e6) == replace(plan, engines=[1, 2, 3, 4])


def test_what_a_process_uses_is_read_from_the_system():
    before = _cpu_s(os.getpid())
    deadline = time.process_time() + 0.1
    while time.process_time() < deadline:
        pass
    assert 0.05 <= _cpu_s(os.getpid()) - before <= 1.0
    assert 10.0 < _status_mb(os.getpid(), "VmRSS") <= _status_mb(os.getpid(), "VmHWM")
