"""Readers that are kept: one mapping for many versions, and never anything but what the segment holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.errors import WeightsRefused
from rlsys.records import TensorEntry
from rlsys.weights.readers import SegmentReaders
from rlsys.weights.segment import SegmentWriter


def write(path: Path, tensors: dict[str, torch.Tensor]) -> tuple[TensorEntry, ...]:
    writer = SegmentWriter(path, torch.float32)
    writer.write(tensors)
    return writer.finish()


def test_versions_alike_are_read_by_one_mapping_and_views_show_the_newest(tmp_path):
    path, kept = tmp_path / "s", SegmentReaders()
    first = kept.open(str(path), write(path, {"a": torch.ones(5)}))
    ((_, view),) = first.tensors()
    second = kept.open(str(path), write(path, {"a": torch.full((5,), 2.0)}))
    second.verify()
    assert second is first and view.tolist() == [2.0] * 5


def test_a_view_that_was_written_into_is_not_taken_for_the_next_version(tmp_path):
    path, kept = tmp_path / "s", SegmentReaders()
    first = kept.open(str(path), write(path, {"a": torch.ones(5), "b": torch.ones(5000)}))
    views = dict(first.tensors())
    views["b"][4000].zero_()
    second = kept.open(str(path), write(path, {"a": torch.ones(5), "b": torch.full((5000,), 2.0)}))
    second.verify()
    assert second is not first and dict(second.tensors())["b"].tolist() == [2.0] * 5000


def test_bytes_that_are_wrong_are_refused_by_a_kept_reader_too(tmp_path):
    path, kept = tmp_path / "s", SegmentReaders()
    kept.open(str(path), write(path, {"a": torch.ones(5)})).verify()
    entries = write(path, {"a": torch.full((5,), 2.0)})
    with path.open("r+b") as file:
        file.seek(entries[0].offset)
        file.write(b"\xff")
    with pytest.raises(WeightsRefused, match="tensor a"):
        kept.open(str(path), entries).verify()


def test_a_segment_made_anew_under_its_old_path_is_mapped_anew(tmp_path):
    path, kept = tmp_path / "s", SegmentReaders()
    kept.open(str(path), write(path, {"a": torch.ones(5)}))
    path.rename(tmp_path / "before")  # its inode stays taken
    reader = kept.open(str(path), write(path, {"a": torch.full((5,), 2.0)}))
    reader.verify()
    path.unlink()
    with pytest.raises(WeightsRefused, match="cannot be mapped"):
        kept.open(str(path), ())


def test_of_gone_mirrors_no_mapping_is_kept(tmp_path):
    kept = SegmentReaders()
    manifests = {name: write(tmp_path / name, {"a": torch.ones(5)}) for name in "abc"}
    opened = {name: kept.open(str(tmp_path / name), entries) for name, entries in manifests.items()}
    again = {name: kept.open(str(tmp_path / name), manifests[name]) for name in "cba"}
    assert [name for name in "abc" if again[name] is opened[name]] == ["b", "c"]


SHAPES = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3000)), min_size=1, max_size=4)


@settings(deadline=None)
@given(versions=st.lists(st.tuples(SHAPES, st.booleans()), min_size=1, max_size=6))
def test_a_kept_reader_reads_every_version_as_a_new_one_would(tmp_path_factory, versions):
    path, kept = tmp_path_factory.mktemp("readers") / "s", SegmentReaders()
    for number, (shapes, writes) in enumerate(versions):
        writer = SegmentWriter(path, torch.float32)
        for name, size in shapes:
            writer.write({name: torch.arange(size) + float(number)})
        reader = kept.open(str(path), writer.finish())
        reader.verify()
        views = [view for _, view in reader.tensors()]
        assert [view.tolist() for view in views] == [[number + place for place in range(size)] for _, size in shapes]
        if writes:
            views[-1].zero_()
