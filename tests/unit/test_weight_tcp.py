"""Segments over TCP: the bytes arrive, whatever breaks on the way; nobody gets what he may not have."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlsys.errors import WeightsRefused
from rlsys.records import Probe, Version, WeightVersion
from rlsys.weights import tcp
from rlsys.weights.segment import SegmentReader, SegmentWriter
from rlsys.weights.tcp import SegmentServer, Source, mirror

HOST = "127.0.0.1"


def weights_in(path: Path, sizes: list[int], seed: int = 0) -> WeightVersion:
    generator = torch.Generator().manual_seed(seed)
    writer = SegmentWriter(path, torch.float32)
    writer.write({f"tensor{number}": torch.randn(size, generator=generator) for number, size in enumerate(sizes)})
    return WeightVersion(
        version=Version(incarnation=0, step=3),
        segment=str(path),
        tensors=writer.finish(),
        probe=Probe(token_ids=(), logprobs=()),
        previous_probe=None,
    )


@pytest.fixture
def server(tmp_path) -> Iterator[SegmentServer]:
    server = SegmentServer(HOST, [tmp_path / "learner"])
    yield server
    server.close()


def check_equal(mirrored: WeightVersion, original: WeightVersion) -> None:
    reader = SegmentReader(mirrored.segment, mirrored.tensors)
    reader.verify()
    wanted = dict(SegmentReader(original.segment, original.tensors).tensors())
    for name, tensor in reader.tensors():
        assert torch.equal(tensor, wanted[name])


@given(sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=6), range_bytes=st.integers(100, 4000))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mirrored_version_is_the_version(tmp_path, server, sizes, range_bytes):
    weights = weights_in(tmp_path / "learner", sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tcp, "RANGE_BYTES", range_bytes)
        mirrored = mirror(weights, server.source, tmp_path / "mirror")
    assert mirrored == replace(weights, segment=str(tmp_path / "mirror"))
    check_equal(mirrored, weights)


def test_a_mirror_is_written_again_for_the_next_version(tmp_path, server):
    for seed, sizes in enumerate(([4000, 10], [20_000], [5])):
        weights = weights_in(tmp_path / "learner", sizes, seed)
        check_equal(mirror(weights, server.source, tmp_path / "mirror"), weights)


class BreakingRelay:
    """Passes connections on to the server, and breaks each after so many bytes."""

    def __init__(self, source: Source, limits: list[int]) -> None:
        self._source, self._limits = source, iter(limits)
        self._listener = socket.create_server((HOST, 0))
        self.source = replace(source, port=self._listener.getsockname()[1])
        self.num_connections = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            limit = next(self._limits, None)
            upstream = socket.create_connection((self._source.host, self._source.port))
            threading.Thread(target=_pass_on, args=(client, upstream), daemon=True).start()
            _pass_on(upstream, client, limit)
            for side in (client, upstream):
                with suppress(OSError):
                    side.shutdown(socket.SHUT_RDWR)  # the other thread still reads: closing alone would end nothing
                side.close()

    def close(self) -> None:
        self._listener.close()


def _pass_on(source: socket.socket, target: socket.socket, limit: int | None = None) -> None:
    try:
        while limit is None or limit > 0:
            data = source.recv(1024 if limit is None else min(1024, limit))
            if not data:
                return
            target.sendall(data)
            limit = None if limit is None else limit - len(data)
    except OSError:
        return


def test_a_broken_connection_goes_on_where_it_was(tmp_path, server, monkeypatch):
    monkeypatch.setattr(tcp, "RANGE_BYTES", 1000)
    weights = weights_in(tmp_path / "learner", [5000, 5000])
    relay = BreakingRelay(server.source, [7000, 1, 12_345, 0, 0])
    check_equal(mirror(weights, relay.source, tmp_path / "mirror"), weights)
    relay.close()
    assert relay.num_connections == 6  # the last one is not broken


def test_one_that_breaks_for_ever_is_given_up_by_name(tmp_path, server):
    weights = weights_in(tmp_path / "learner", [5000])
    relay = BreakingRelay(server.source, [100] + [0] * 100)
    with pytest.raises(WeightsRefused, match=r"broke 6 times in a row at byte 100 of 20,000"):
        mirror(weights, relay.source, tmp_path / "mirror")
    relay.close()


@pytest.mark.parametrize("change", [{"token": "0" * 32}, {"token": ""}])
def test_without_the_token_nothing_is_handed_out(tmp_path, server, change):
    weights = weights_in(tmp_path / "learner", [10])
    with pytest.raises(WeightsRefused, match="the other side ended it"):
        mirror(weights, replace(server.source, **change), tmp_path / "mirror")


def test_other_files_and_ranges_beyond_the_segment_are_refused(tmp_path, server):
    weights = weights_in(tmp_path / "learner", [10])
    (tmp_path / "secret").write_bytes(b"x" * 5000)
    with pytest.raises(WeightsRefused):
        mirror(replace(weights, segment=str(tmp_path / "secret")), server.source, tmp_path / "mirror")
    beyond = weights.tensors[0]._replace(num_bytes=1 << 40)
    for line in (b"no json\n", b"{}\n", b'{"token": 1}\n'):
        with socket.create_connection((HOST, server.source.port), 5) as connection:
            connection.sendall(line)
            assert connection.recv(1) == b""
    request = {"token": server.source.token, "segment": weights.segment, "offset": 0, "num_bytes": beyond.num_bytes}
    with socket.create_connection((HOST, server.source.port), 5) as connection:
        connection.sendall(tcp.json.dumps(request).encode() + b"\n")
        assert connection.recv(1) == b""
