"""Runs a command, and ends it with everything it started once whoever asked for it is gone.

    python supervise.py PARENT_PID COMMAND...

It is the leader of its process group, and what the command starts stays in that group. The group
is killed when the command ends, when standard input closes, or when the parent is another process
than PARENT_PID: then it has been killed and nobody else would do it. The command itself dies
with the supervisor, by a signal of the kernel's. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys

#: How often the parent is looked at; a closed standard input is seen at once.
_LOOK_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> None:
    """Run the command to its end, or until nobody wants it any more."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    child = subprocess.Popen(  # noqa: S603 - what our own caller asks for
        command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent
    )
    while child.poll() is None and os.getppid() == parent:
        if select.select([0], [], [], _LOOK_SECONDS)[0] and not os.read(0, 1):
            break
    os.killpg(0, signal.SIGKILL)


def _die_with_parent() -> None:
    """Between fork and exec: the defaults again, and the kernel's promise."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
