"""Messages between two processes over a Unix stream socket: JSON, with file descriptors if need be. Linux only."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

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
    # The text travels as one more open file, so a message is one byte, whole or not there at all.
    with os.fdopen(os.memfd_create("message"), "r+b") as file:
        file.write(json.dumps(message).encode())
        file.seek(0)
        socket.send_fds(channel, [b"m"], [file.fileno(), *descriptors])


def receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next message and its descriptors, which do not survive an exec; None if the other end is gone. *local*"""
    try:
        data, descriptors, _, _ = socket.recv_fds(channel, 1, 1 + _MOST_DESCRIPTORS)
    except ConnectionError:
        return None
    if not data:
        return None
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    with os.fdopen(descriptors[0], "rb") as file:
        return json.load(file), descriptors[1:]
