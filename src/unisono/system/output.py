"""Printing to streams that may fail: their reader may end, their disk be full, their terminal be closed.

None of that may end a training. Text that cannot be written is dropped, and that is said once, where still possible.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import IO, cast


def standard_output() -> IO[str]:
    """A stream to where ``sys.stdout`` goes now, which never fails. *Local*."""
    return cast(IO[str], _Lasting(sys.stdout))


def say(text: str, *, error: bool = False) -> None:
    """Print a line on standard output, or standard error, if that still goes anywhere. *Local*."""
    stream = _Lasting(sys.stderr if error else sys.stdout)
    stream.write(text + "\n")
    stream.flush()


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether a person sees what is written; also of a stream that was never there or is closed. *Local*."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


class _Lasting:
    """A text stream over one that may fail.

    Args:
        stream: None if the process was started without.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        # Where rich's display has put itself before a stream, what the display itself draws would come back to it.
        self._stream: IO[str] | None = getattr(stream, "rich_proxied_file", stream)

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def closed(self) -> bool:
        return self._stream is None or self._stream.closed

    def isatty(self) -> bool:
        return is_terminal(self._stream)

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError("there is no such stream")
        return self._stream.fileno()

    def write(self, text: str) -> int:
        if self._stream is not None and not self.closed:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:  # a file name may hold anything
                self.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
            except OSError as error:
                self._fails(error)
        return len(text)

    def flush(self) -> None:
        if self._stream is not None and not self.closed:
            try:
                self._stream.flush()
            except OSError as error:
                self._fails(error)

    def _fails(self, error: OSError) -> None:
        if isinstance(error, BlockingIOError):
            return  # the reader is slow, and the stream was made not to wait
        assert self._stream is not None
        # Python writes what is left in the buffer when it ends, and would end with another status if it could not.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        if self._stream is not sys.stderr:
            say(
                f"unisono: standard output cannot be written to ({error.strerror or error}): the run goes on without showing it",
                error=True,
            )
