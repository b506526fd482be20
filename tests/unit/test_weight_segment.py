"""Weight segments: bytes arrive cast, aligned and provable; pages are recycled; dead owners leave nothing behind."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from rlsys.errors import WeightsRefused
from rlsys.weights.segment import (
    GROWTH_BYTES,
    SegmentReader,
    SegmentWriter,
    remove_segments,
    remove_stale_segments,
    segment_path,
)


def _write(path: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32):
    writer = SegmentWriter(path, dtype)
    writer.write(tensors)
    return writer.finish()


def test_tensors_come_back_in_the_engines_dtype(tmp_path):
    odd = torch.tensor([[1.0, 2.0], [3.0, 4.00390625]])  # the last one has no bfloat16: it rounds to 4.0
    entries = _write(tmp_path / "s", {"odd": odd.t(), "ids": torch.tensor([7, 8])}, torch.bfloat16)
    reader = SegmentReader(str(tmp_path / "s"), entries)
    reader.verify()
    tensors = dict(reader.tensors())
    assert tensors["odd"].dtype == torch.bfloat16
    assert tensors["odd"].tolist() == [[1.0, 3.0], [2.0, 4.0]]
    assert tensors["ids"].tolist() == [7, 8]


def test_entries_are_aligned_and_carry_the_hash_of_their_bytes(tmp_path):
    entries = _write(tmp_path / "s", {"a": torch.tensor([1.5]), "b": torch.tensor([2.5, 3.5])})
    assert [(entry.offset, entry.num_bytes) for entry in entries] == [(0, 4), (64, 8)]
    assert entries[1].checksum == xxhash.xxh3_64_intdigest(torch.tensor([2.5, 3.5]).numpy().tobytes())


def test_recycled_segment_keeps_its_pages_and_grows_when_needed(tmp_path):
    path = tmp_path / "s"
    _write(path, {"a": torch.zeros(GROWTH_BYTES // 4 + 1)})
    size, inode = path.stat().st_size, path.stat().st_ino
    assert size == 2 * GROWTH_BYTES
    small = _write(path, {"a": torch.ones(3)})
    assert (path.stat().st_size, path.stat().st_ino) == (size, inode)
    SegmentReader(str(path), small).verify()
    large = {"a": torch.rand(GROWTH_BYTES // 4), "b": torch.rand(2 * GROWTH_BYTES // 4), "c": torch.rand(5)}
    entries = _write(path, large)
    assert path.stat().st_ino == inode and path.stat().st_size == 4 * GROWTH_BYTES
    reader = SegmentReader(str(path), entries)
    reader.verify()
    assert all(torch.equal(view, large[name]) for name, view in reader.tensors())


def test_a_kept_writer_begins_every_version_anew(tmp_path):
    writer = SegmentWriter(tmp_path / "s", torch.float32)
    for value in (1.0, 2.0):
        writer.write({"a": torch.full((5,), value)})
        entries = writer.finish()
        assert [(entry.name, entry.offset) for entry in entries] == [("a", 0)]
        ((_, view),) = SegmentReader(str(tmp_path / "s"), entries).tensors()
        assert view.tolist() == [value] * 5


SHAPES = st.tuples(st.integers(1, 40), st.sampled_from([torch.float32, torch.int64]))
BUCKETS = st.lists(st.dictionaries(st.sampled_from("abc"), SHAPES), max_size=4)


@given(versions=st.lists(BUCKETS.filter(any), min_size=1, max_size=5))
def test_a_kept_writer_writes_every_version_as_a_new_one_would(tmp_path_factory, versions):
    folder = tmp_path_factory.mktemp("segments")
    kept = SegmentWriter(folder / "kept", torch.bfloat16)
    for number, shapes in enumerate(versions):
        buckets = [
            {name: torch.arange(size, dtype=dtype) + number for name, (size, dtype) in bucket.items()}
            for bucket in shapes
        ]
        tensors = [named for bucket in buckets for named in bucket.items()]
        new = SegmentWriter(folder / "new", torch.bfloat16)
        for bucket in buckets:
            kept.write(bucket)
        for name, tensor in tensors:  # one by one: buckets are only a way to hand them over
            new.write({name: tensor})
        entries = kept.finish()
        assert entries == new.finish()
        reader = SegmentReader(str(folder / "kept"), entries)
        reader.verify()
        for (_, tensor), (_, view) in zip(tensors, reader.tensors(), strict=True):
            assert view.tolist() == tensor.tolist()


def test_a_corrupted_byte_is_refused_by_the_name_of_its_tensor(tmp_path):
    path = tmp_path / "s"
    entries = _write(path, {"a": torch.rand(100), "b": torch.rand(100)})
    with path.open("r+b") as file:
        file.seek(entries[1].offset + 17)
        byte = file.read(1)[0]
        file.seek(entries[1].offset + 17)
        file.write(bytes([byte ^ 1]))
    got = xxhash.xxh3_64_intdigest(path.read_bytes()[entries[1].offset :][: entries[1].num_bytes])
    with pytest.raises(WeightsRefused, match="tensor b") as refused:
        SegmentReader(str(path), entries).verify()
    assert f"{got:#018x}" in str(refused.value) and f"{entries[1].checksum:#018x}" in str(refused.value)


def test_a_manifest_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "s"
    (entry,) = _write(path, {"a": torch.rand(100)})
    with pytest.raises(WeightsRefused, match="within the segment"):
        SegmentReader(str(path), [entry._replace(offset=path.stat().st_size - 4)])
    with pytest.raises(WeightsRefused, match="wanted those of shape"):
        SegmentReader(str(path), [entry._replace(shape=(101,))])
    with pytest.raises(WeightsRefused, match="cannot be mapped"):
        SegmentReader(str(tmp_path / "gone"), [entry])


def test_a_reader_cannot_change_the_segment(tmp_path):
    entries = _write(tmp_path / "s", {"a": torch.ones(3)})
    ((_, view),) = SegmentReader(str(tmp_path / "s"), entries).tensors()
    view.zero_()
    SegmentReader(str(tmp_path / "s"), entries).verify()


def test_only_segments_of_dead_owners_are_swept(tmp_path):
    with subprocess.Popen(["true"]) as process:
        process.wait()
    dead = segment_path("run-a", "0", folder=tmp_path, pid=process.pid)
    mine = segment_path("run-a", "1", folder=tmp_path)
    other = tmp_path / "rlsys@notes"
    for path in (dead, mine, other):
        path.touch()
    assert str(os.getpid()) in mine.name
    assert remove_stale_segments(tmp_path) == (dead,)
    assert mine.exists() and other.exists()


def test_a_run_removes_its_own_segments_only(tmp_path):
    own, longer = segment_path("a", "0", folder=tmp_path), segment_path("a-b", "0", folder=tmp_path)
    own.touch(), longer.touch()
    assert remove_segments("a", tmp_path) == (own,)
    assert longer.exists()
