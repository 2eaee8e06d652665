"""Steps on their way from rank 0 to the other ranks: arrays once in shared memory, a word on each rank's socket.

A rank reads the arrays where they lie. It launches a step as soon as rank 0 has laid it out, without waiting for
anybody's GPU; rank 0 waits only for a rank that is ``SLOTS`` steps behind.
"""

from __future__ import annotations

import mmap
import os
import pickle
import socket
from collections.abc import Sequence
from typing import Any

import msgspec

SLOTS = 4  # steps that are written and not yet read by all
_ROOM = 1 << 20  # bytes of a slot at first
_ALIGN = 64
_WORD = 1 << 16  # bytes of the longest word


class LostError(Exception):
    """The process at the other end of a socket has ended."""


def memory(name: str) -> int:
    """A file descriptor of memory that processes share by inheriting it; gone with the last of them."""
    return os.memfd_create(name)


class _Slot:
    """Shared memory behind ``fd``, which its writer makes larger when need be."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._view = memoryview(b"")

    def room(self, size: int) -> memoryview:
        """At least ``size`` bytes to write to."""
        if size > len(self._view):
            os.ftruncate(self._fd, max(_ROOM, 2 * size))
        return self.view(size)

    def view(self, size: int) -> memoryview:
        """At least the first ``size`` bytes."""
        if size > len(self._view):
            self._view = memoryview(mmap.mmap(self._fd, os.fstat(self._fd).st_size))
        return self._view


class Sender:
    """Rank 0's end. ``sockets``: of kind SOCK_SEQPACKET, one a rank."""

    def __init__(self, sockets: Sequence[socket.socket], slots: Sequence[int]) -> None:
        self._sockets = sockets
        self._slots = [_Slot(fd) for fd in slots]
        self._sent = 0
        self._read = [0] * len(sockets)

    def send(self, message: object) -> None:
        """Arrays in ``message`` are copied now. LostError if a rank has ended."""
        buffers: list[memoryview] = []
        head = pickle.dumps(message, protocol=5, buffer_callback=lambda buffer: buffers.append(buffer.raw()))
        parts = [memoryview(head), *buffers]
        sizes = [part.nbytes for part in parts]
        for at, connection in enumerate(self._sockets):
            while self._sent - self._read[at] >= len(self._slots):
                receive(connection)
                self._read[at] += 1
        number = self._sent % len(self._slots)
        room = self._slots[number].room(_end(sizes))
        for start, part in zip(_starts(sizes), parts, strict=True):
            room[start : start + part.nbytes] = part
        word = msgspec.msgpack.encode((number, sizes))
        for connection in self._sockets:
            send(connection, word)
        self._sent += 1


class Receiver:
    """Another rank's end."""

    def __init__(self, connection: socket.socket, slots: Sequence[int]) -> None:
        self._socket = connection
        self._slots = [_Slot(fd) for fd in slots]

    def receive(self) -> Any:
        """The next message, whose arrays are valid until ``done``. LostError if rank 0 has ended."""
        number, sizes = msgspec.msgpack.decode(receive(self._socket), type=tuple[int, list[int]])
        view = self._slots[number].view(_end(sizes))
        head, *buffers = (view[start : start + size] for start, size in zip(_starts(sizes), sizes, strict=True))
        return pickle.loads(head, buffers=buffers)

    def done(self) -> None:
        """The message's arrays have been read."""
        send(self._socket, b".")


def send(connection: socket.socket, word: bytes) -> None:
    """LostError if nobody is there to read it."""
    try:
        connection.send(word)
    except OSError as error:
        raise LostError(str(error)) from error


def receive(connection: socket.socket) -> bytes:
    """The next word; waits for it. LostError if the other end is closed."""
    try:
        word = connection.recv(_WORD)
    except OSError as error:
        raise LostError(str(error)) from error
    if not word:
        raise LostError("the connection is closed")
    return word


def _starts(sizes: Sequence[int]) -> list[int]:
    starts, at = [], 0
    for size in sizes:
        starts.append(at)
        at = -(-(at + size) // _ALIGN) * _ALIGN
    return starts


def _end(sizes: Sequence[int]) -> int:
    return _starts([*sizes, 0])[-1]
