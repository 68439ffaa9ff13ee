"""Become Kafka's Java process, and leave a watcher behind that ends it when its owner dies.

Run as ``python -P broker_guard.py OWNER_PID JAVA ARGUMENT...`` by the owner itself. The kernel's parent-death
signal is no substitute: it fires when the *thread* that started the child ends.
"""

from __future__ import annotations

import os
import signal
import sys
import time

_POLL_S = 0.2
_GRACE_S = 10.0  # a clean stop takes about two seconds


def watch(java_pid: int, owner_pid: int) -> None:
    """Wait until Java has gone, or its parent is no longer the owner; end it in that case.

    This runs in a child of the Java process: while that is our parent, its process id cannot have been
    given to anybody else.
    """
    import psutil

    def is_alive() -> bool:
        return os.getppid() == java_pid

    while is_alive():
        try:
            is_orphan = psutil.Process(java_pid).ppid() != owner_pid
        except psutil.NoSuchProcess:
            return
        if is_orphan:
            break
        time.sleep(_POLL_S)
    deadline = time.monotonic() + _GRACE_S
    if is_alive():
        os.kill(java_pid, signal.SIGTERM)
    while is_alive() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    if is_alive():
        os.kill(java_pid, signal.SIGKILL)


def main(arguments: list[str]) -> None:
    """Fork the watcher, then replace this process by Java, so that the owner's child *is* Kafka."""
    owner_pid, command = int(arguments[0]), arguments[1:]
    if os.getppid() != owner_pid:
        sys.exit("the process that asked for a broker has gone")
    java_pid = os.getpid()
    if os.fork() == 0:
        watch(java_pid, owner_pid)
        os._exit(0)
    os.execv(command[0], command)  # noqa: S606 - no shell is the point


if __name__ == "__main__":
    main(sys.argv[1:])
