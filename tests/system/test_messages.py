"""Messages with file descriptors."""

from __future__ import annotations

import os
import socket
import sys

import pytest

from unisono.system.messages import receive, send

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="they need memfd_create")


def test_messages_of_any_length_arrive_whole_each_with_its_own_descriptors() -> None:
    ours, theirs = socket.socketpair()
    reader, writer = os.pipe()
    with ours, theirs:
        send(ours, {"text": "long " * 10**6})
        send(ours, {"number": 2}, [reader, writer])
        os.close(reader)
        os.close(writer)
        assert receive(theirs) == ({"text": "long " * 10**6}, [])
        message, (reader, writer) = receive(theirs) or ({}, [])
        assert message == {"number": 2}
        assert not os.get_inheritable(reader)
        os.write(writer, b"through")
        assert os.read(reader, 10) == b"through"
        os.close(reader)
        os.close(writer)


def test_when_the_other_end_is_gone_there_is_no_next_message() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        send(ours, {"last": True})
        ours.close()
        assert receive(theirs) == ({"last": True}, [])
        assert receive(theirs) is None
        with pytest.raises(OSError, match="Broken pipe"):
            send(theirs, {})
