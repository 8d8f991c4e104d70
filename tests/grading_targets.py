"""Functions that misbehave, for the tests of the worker pool."""

# ruff: noqa: PTH101, PTH102, PTH104, PTH123, PTH211, SIM115

import ctypes
import mmap
import os
import resource
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

_native = ctypes.CDLL(None)
#: Looked up before the worker is sealed: calling them announces nothing to Python's hook.
_looked_up = [_native[name] for name in ("creat", "mkdir", "system", "unlink", "mkfifo", "kill")]
_creat, _mkdir, _system, _unlink, _mkfifo, _kill = _looked_up


def act(command: str, argument: str) -> object:
    """Do what `command` names with `argument`."""
    return _ACTS[command](argument)


def half(completion: str, gold: str) -> float:
    """One for equal texts, a half for others."""
    return 1.0 if completion == gold else 0.5


def judge(completion: str, gold: str) -> bool:
    """Equal texts are right; the completion may say how long to take over it, as in `0.1:7`."""
    seconds, _, answer = completion.rpartition(":")
    time.sleep(float(seconds or 0))
    return answer == gold


def _loop(_: str) -> None:
    while True:
        pass


def _use_up(_: str) -> None:
    """Compute for as long as the kernel lets it, where that is a second more than was used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime) + 1, hard))
    _loop("")


def _pid_after(seconds: str) -> int:
    time.sleep(float(seconds))
    return os.getpid()


def _sockets() -> list[int]:
    """Descriptors of this process that are sockets."""
    found = []
    for number in range(3, 64):
        try:
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                found.append(number)
        except OSError:
            continue
    return found


def _after_a_while(call: str) -> object:
    time.sleep(0.1)
    return act(*call.split(" ", 1))


def _say(text: str) -> str:
    for number in _sockets():
        os.write(number, text.encode())
    return "said"


def _flood_reply(_: str) -> None:
    for number in _sockets():
        while True:
            os.write(number, b"x" * (1 << 16))


def _print(count: str) -> str:
    for _i in range(int(count)):
        print("noise" * 1_000)
        os.write(2, b"noise")
    return "printed"


def _close_everything(_: str) -> None:
    os.closerange(3, 64)
    time.sleep(60)


def _deep_in_native_code(_: str) -> None:
    nested: object = ()
    for _i in range(300_000):
        nested = (nested,)
    hash(nested)


def _child(seconds: str) -> None:
    """Start a process that outlasts the case, and wait for it."""
    subprocess.run(["sleep", seconds], check=True)


_kept: list[object] = []


def _in_child(pid: int, path: str) -> None:
    if pid == 0:
        os.mkdir(path)
        os._exit(0)


def _keep(megabytes: str) -> str:
    _kept.append(bytearray(int(megabytes) << 20))
    return "kept"


def _raise(text: str) -> None:
    raise ValueError(text)


_ACTS: dict[str, Callable[[str], object]] = {
    "echo": lambda text: text,
    "equal": lambda text: len(set(text.split("="))) == 1,
    "pid": _pid_after,
    "loop": _loop,
    "use up": _use_up,
    "cpu limit": lambda _: resource.getrlimit(resource.RLIMIT_CPU)[0],
    "sleep": lambda seconds: time.sleep(float(seconds)) or seconds,
    "stop": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "die": lambda status: os._exit(int(status)),
    "leave": lambda status: sys.exit(int(status)),
    "kill itself": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "deep": _deep_in_native_code,
    "recurse": lambda text: _ACTS["recurse"](text),
    "memory": lambda count: len("x" * int(count)),
    "keep": _keep,
    "print": _print,
    "say": _say,
    "after 0.1 s": _after_a_while,
    "flood": _flood_reply,
    "close": _close_everything,
    "raise": _raise,
    "list": lambda item: [item],
    "digits": lambda count: 10 ** int(count),
    "text": lambda count: "y" * int(count),
    "child": _child,
    "environment": lambda name: os.environ.get(name),
    "open": lambda path: Path(path).write_text("x") and None,
    "os.open": lambda path: os.open(path, os.O_CREAT | os.O_RDWR),
    "append": lambda path: open(path, "a").close(),
    "mkdir": os.mkdir,
    "mkfifo": lambda path: os.mkfifo(path),
    "mknod": lambda path: os.mknod(path),
    "symlink": lambda path: os.symlink("/", path),
    "link": lambda path: os.link(__file__, path),
    "utime": lambda path: os.utime(path, (1, 1)),
    "chmod": lambda path: os.chmod(path, 0o777),
    "remove": os.remove,
    "rename": lambda path: os.rename(path, path + ".moved"),
    "truncate": lambda path: os.truncate(path, 0),
    "setxattr": lambda path: os.setxattr(path, "user.x", b"x"),
    "chdir": os.chdir,
    "copy": lambda path: shutil.copyfile(__file__, path),
    "rmtree": shutil.rmtree,
    "tempfile": lambda path: tempfile.NamedTemporaryFile(dir=Path(path).parent).name,
    "mkdtemp": lambda path: tempfile.mkdtemp(dir=Path(path).parent),
    "sqlite": lambda path: sqlite3.connect(path).execute("create table t (x)") and None,
    "shell": lambda path: os.system(f"echo x > {path}"),
    "popen": lambda path: subprocess.run(["touch", path], check=True) and None,
    "exec": lambda path: os.execv("/bin/touch", ["touch", path]),
    "spawn": lambda path: os.posix_spawn("/bin/touch", ["touch", path], {}),
    "fork": lambda path: _in_child(os.fork(), path),
    "thread": lambda _: threading.Thread(target=int).start(),
    "kill": lambda pid: os.kill(int(pid), 0),
    "killpg": lambda _: os.killpg(os.getpgid(os.getppid()), 0),
    "connect": lambda port: socket.socket().connect(("127.0.0.1", int(port or 1))),
    "datagram": lambda _: socket.socket(type=socket.SOCK_DGRAM).sendto(b"", ("127.0.0.1", 9)),
    "ctypes": lambda path: ctypes.CDLL("libc.so.6").creat(path.encode(), 0o600),
    "mmap": lambda _: mmap.mmap(-1, 1),
    "native creat": lambda path: _creat(path.encode(), 0o600),
    "native mkdir": lambda path: _mkdir(path.encode(), 0o700),
    "native system": lambda path: _system(f"mkdir {path}".encode()),
    "native unlink": lambda path: _unlink(path.encode()),
    "native fifo": lambda path: _mkfifo(path.encode(), 0o600),
    "native kill": lambda _: _kill(os.getppid(), 0),
    "eval": lambda text: eval(text),
}
