"""Weight segments over TCP: how a version reaches engines on another machine.

A server hands out the bytes of the learner's segments; a mirror on the other machine reads them into a segment of its
own there, from which every engine of that machine loads as from the learner's. A range of bytes is asked for at a time,
several ahead of the one that is being read; a connection that breaks is made again, and goes on with the first byte
that is not there yet. Whether they are the right bytes is not asked here: engines compare every tensor's checksum.

Wire format: a request is one line of JSON, ``{"token", "segment", "offset", "num_bytes"}``; the answer is that many
bytes, or nothing and the end of the connection where it is refused.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
import socket
import socketserver
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlsys.errors import WeightsRefused
from rlsys.records import WeightVersion
from rlsys.weights.segment import GROWTH_BYTES

RANGE_BYTES = 8 << 20  # asked for at once: long enough to hide a round trip, short enough to lose little at a break
RANGES_AHEAD = 4
MAX_BREAKS = 5  # in a row without a single range in between
ANSWER_TIMEOUT_S = 30.0  # without a byte
_MAX_REQUEST_BYTES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where segments are handed out, and the word that opens them.

    Attributes:
        host, port: of the server.
        token: every request must carry it.
    """

    host: str
    port: int
    token: str


class SegmentServer:
    """Hands out the bytes of given segments, in threads of its own, until ``close``.

    Args:
        host: address of this machine that others reach.
        paths: the segments; nothing else is ever read.
    """

    def __init__(self, host: str, paths: Sequence[Path | str]) -> None:
        token, allowed = secrets.token_hex(16), frozenset(map(str, paths))

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while line := self.rfile.readline(_MAX_REQUEST_BYTES):
                    if not _answer(self.connection, line, token, allowed):
                        return

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address, daemon_threads, block_on_close = True, True, False

            def handle_error(self, request: object, client_address: object) -> None:
                """A reader that went away: it asks again, or is gone for good."""

        self._server = Server((host, 0), Handler)
        self.source = Source(host=host, port=self._server.server_address[1], token=token)
        threading.Thread(target=self._server.serve_forever, name="rlsys-segments", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def free_port(host: str = "") -> int:
    """A port of this machine that is free now, at ``host`` or at every address of it."""
    with socket.socket() as free:
        free.bind((host, 0))
        return int(free.getsockname()[1])


def mirror(weights: WeightVersion, source: Source, path: Path | str) -> WeightVersion:
    """Copy the bytes of ``weights`` from ``source`` into the segment ``path`` on this machine.

    Returns:
        The same version, in that segment.

    Raises:
        WeightsRefused: the server refuses, or cannot be reached any more.
    """
    num_bytes = max(entry.offset + entry.num_bytes for entry in weights.tensors)
    with _mapped(path, num_bytes) as mapped, memoryview(mapped) as target:
        _fetch(weights.segment, source, target[:num_bytes])
    return replace(weights, segment=str(path))


def _fetch(segment: str, source: Source, target: memoryview) -> None:
    done, breaks, cause = 0, 0, ""
    with target:
        while done < len(target):
            if breaks > MAX_BREAKS:
                raise WeightsRefused(
                    f"segment {segment} from {source.host}:{source.port}: the connection broke {breaks} times in a row "
                    f"at byte {done:,} of {len(target):,}; the last time: {cause}"
                )
            before = done
            try:
                done = _fetch_on_one_connection(segment, source, target, done)
            except OSError as error:
                done, cause = getattr(error, "done", before), f"{type(error).__name__}: {error}"
            breaks = 0 if done > before else breaks + 1


class _Broken(ConnectionError):
    """A connection that ended too early.

    Attributes:
        done: bytes that are there.
    """

    def __init__(self, done: int, cause: str) -> None:
        super().__init__(cause)
        self.done = done


def _fetch_on_one_connection(segment: str, source: Source, target: memoryview, done: int) -> int:
    """Go on at byte ``done``. Raises OSError where the connection breaks, with what is there by then."""
    asked = done
    with socket.create_connection((source.host, source.port), ANSWER_TIMEOUT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while done < len(target):
            while asked < len(target) and asked - done < RANGES_AHEAD * RANGE_BYTES:
                num_bytes = min(RANGE_BYTES, len(target) - asked)
                request = {"token": source.token, "segment": segment, "offset": asked, "num_bytes": num_bytes}
                connection.sendall(json.dumps(request).encode() + b"\n")
                asked += num_bytes
            try:
                received = connection.recv_into(target[done:asked])
            except OSError as error:
                raise _Broken(done, f"{type(error).__name__}: {error}") from error
            if received == 0:
                raise _Broken(done, "the other side ended it")
            done += received
    return done


def _answer(connection: socket.socket, line: bytes, token: str, allowed: frozenset[str]) -> bool:
    """Send what one request asks for. False where it may not have it."""
    try:
        request = json.loads(line)
        segment, offset, num_bytes = str(request["segment"]), int(request["offset"]), int(request["num_bytes"])
        is_known = secrets.compare_digest(str(request["token"]), token)
    except (ValueError, KeyError, TypeError):
        return False
    if not is_known or segment not in allowed or offset < 0 or num_bytes <= 0:
        return False
    with open(segment, "rb") as file:
        if offset + num_bytes > os.fstat(file.fileno()).st_size:
            return False
        return connection.sendfile(file, offset, num_bytes) == num_bytes


def _mapped(path: Path | str, num_bytes: int) -> mmap.mmap:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        size = max(-(-num_bytes // GROWTH_BYTES) * GROWTH_BYTES, os.fstat(fd).st_size)
        os.posix_fallocate(fd, 0, size)  # a full file system is an OSError here, not a SIGBUS later
        return mmap.mmap(fd, size)
    finally:
        os.close(fd)
