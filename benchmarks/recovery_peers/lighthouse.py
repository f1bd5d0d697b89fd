"""torchft's lighthouse, as a process: ``lighthouse.py FILE SETTINGS`` writes its port to FILE and serves until it is ended."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from torchft.coordination import LighthouseServer


def main() -> None:
    # Its own address names this host, which need not resolve: only the port is passed on.
    server = LighthouseServer(bind="[::]:0", min_replicas=1, **json.loads(sys.argv[2]))
    path = Path(sys.argv[1])
    unfinished = path.with_suffix(".new")
    unfinished.write_text(server.address().rsplit(":", 1)[1])
    unfinished.replace(path)
    signal.pause()


if __name__ == "__main__":
    main()
