"""Runs a command and ends it when the process that started this one is gone: ``tether.py COMMAND...``.

Standard input must be a pipe whose other end the starter holds and never writes to. When the starter ends,
by whatever signal, the kernel closes that end and the command is stopped: a killed test or demo leaves no
server behind. Standard library only, run with ``-I -S``: it starts in some milliseconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from types import FrameType

GRACE_S = 15.0  # Kafka flushes its logs and MLflow ends its requests well within this


def end_with_starter(child: subprocess.Popen[bytes]) -> None:
    """Wait for the end of standard input, then stop the command and whatever it started."""
    # Not sys.stdin: its lock would be held by this thread when the main one ends the interpreter.
    while os.read(0, 4096):
        pass
    child.terminate()
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        # The starter made this process the leader of its own group, so the group is this server and no more.
        os.killpg(0, signal.SIGKILL)


def main() -> int:
    """Run the command line's arguments as a command; return its exit code."""
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)

    def forward(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, forward)
    threading.Thread(target=end_with_starter, args=(child,), daemon=True).start()
    code = child.wait()
    return code if code >= 0 else 128 - code  # the shell's convention for a signal


if __name__ == "__main__":
    sys.exit(main())
