"""Messages between two processes over a Unix stream socket: JSON, with file descriptors if need be."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any

_LENGTH = struct.Struct("!Q")
_MOST_DESCRIPTORS = 8


def send(channel: socket.socket, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Sends a message; the receiver gets descriptors of its own, of the same open files. *local*

    Args:
        channel: A connected Unix stream socket.
        message: What JSON can say.
        descriptors: At most 8.

    Raises:
        OSError: The other end is gone.
    """
    text = json.dumps(message).encode()
    data = _LENGTH.pack(len(text)) + text
    sent = socket.send_fds(channel, [data], descriptors) if descriptors else 0
    channel.sendall(data[sent:])


def receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next message and its descriptors, which do not survive an exec; None if the other end is gone. *local*"""
    try:
        data, descriptors, _, _ = socket.recv_fds(channel, _LENGTH.size, _MOST_DESCRIPTORS)
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        data += _exactly(channel, _LENGTH.size - len(data)) if data else b""
        (length,) = _LENGTH.unpack(data)
        return json.loads(_exactly(channel, length)), descriptors
    except (EOFError, struct.error, ConnectionError):
        return None


def _exactly(channel: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = channel.recv(count - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)
