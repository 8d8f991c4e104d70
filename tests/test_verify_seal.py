"""What a sealed worker refuses, by Python's hook and by the kernel."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from headwater.types import Verdict
from headwater.verify.pool import Ending, WorkerLimits, WorkerPool
from headwater.verify.seal import landlock_version
from headwater.verify.verifiers import make_verifier

ACT = "grading_targets:act"
CREATING = (
    "open", "os.open", "append", "mkdir", "mkfifo", "mknod", "symlink", "link", "copy", "tempfile",
    "mkdtemp", "sqlite", "shell", "popen", "spawn", "fork", "ctypes",
)  # fmt: skip
CHANGING = ("open", "append", "remove", "rename", "truncate", "utime", "chmod", "setxattr")
NATIVE = ("native creat", "native mkdir", "native fifo", "native system", "native unlink")
SIGNALS_KNOWN = 6


@pytest.fixture(scope="module")
def sealed() -> Iterator[WorkerPool]:
    pool = WorkerPool(ACT, 1, WorkerLimits(timeout_seconds=5, sealed=True))
    yield pool
    pool.close()


def _seen(folder: Path) -> dict[str, tuple[int, int, int, str]]:
    """What stands in a folder: mode, size, time of change, content."""
    found = {}
    for path in folder.iterdir():
        status = path.lstat()
        content = path.read_text() if path.is_file() else ""
        found[path.name] = (status.st_mode, status.st_size, status.st_mtime_ns, content)
    return found


@pytest.mark.parametrize("command", CREATING)
def test_nothing_can_be_created(sealed: WorkerPool, tmp_path: Path, command: str) -> None:
    (outcome,) = sealed.run([(command, str(tmp_path / "new"))])
    assert (outcome.ending, outcome.detail) == (Ending.RAISED, "ForbiddenInWorker")
    assert _seen(tmp_path) == {}


@pytest.mark.parametrize("command", CHANGING)
def test_nothing_can_be_changed(sealed: WorkerPool, tmp_path: Path, command: str) -> None:
    (tmp_path / "kept").write_text("before")
    before = _seen(tmp_path)
    (outcome,) = sealed.run([(command, str(tmp_path / "kept"))])
    assert (outcome.ending, outcome.detail) == (Ending.RAISED, "ForbiddenInWorker")
    assert _seen(tmp_path) == before


def test_a_folder_can_be_neither_emptied_nor_entered(sealed: WorkerPool, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("before")
    outcomes = sealed.run([("rmtree", str(tmp_path)), ("chdir", str(tmp_path))])
    assert [outcome.detail for outcome in outcomes] == ["ForbiddenInWorker"] * 2
    assert set(_seen(tmp_path)) == {"kept"}


@pytest.mark.parametrize("command", ["exec", "datagram", "mmap", "killpg"])
def test_no_process_socket_mapping_or_signal(
    sealed: WorkerPool, tmp_path: Path, command: str
) -> None:
    (outcome,) = sealed.run([(command, str(tmp_path / "new"))])
    assert (outcome.ending, outcome.detail) == (Ending.RAISED, "ForbiddenInWorker")
    assert _seen(tmp_path) == {}


def test_nobody_is_connected_to_or_signalled(sealed: WorkerPool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        calls = [("connect", str(listener.getsockname()[1])), ("kill", str(os.getpid()))]
        assert [outcome.detail for outcome in sealed.run(calls)] == ["ForbiddenInWorker"] * 2


@pytest.mark.skipif(landlock_version() == 0, reason="needs a Linux kernel with Landlock")
@pytest.mark.parametrize("command", NATIVE)
def test_native_code_is_refused_by_the_kernel(
    sealed: WorkerPool, tmp_path: Path, command: str
) -> None:
    (tmp_path / "kept").write_text("before")
    before = _seen(tmp_path)
    name = "kept" if command == "native unlink" else "new"
    (outcome,) = sealed.run([(command, str(tmp_path / name))])
    assert outcome.ending is Ending.RETURNED
    assert outcome.value != 0
    assert _seen(tmp_path) == before


@pytest.mark.skipif(landlock_version() < SIGNALS_KNOWN, reason="needs Landlock's sixth version")
def test_native_code_cannot_signal_the_fork_server(sealed: WorkerPool) -> None:
    assert sealed.run([("native kill", "")])[0].value == -1


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').getcwd()", "open('/etc/hostname')", "().__class__", "'a'.upper()",
        "eval('1')", "exec('1')", "getattr(1, 'real')", "globals()", "[vars()]",
    ],
)  # fmt: skip
def test_text_that_reaches_out_is_not_compiled(sealed: WorkerPool, text: str) -> None:
    (outcome,) = sealed.run([("eval", text)])
    assert (outcome.ending, outcome.detail) == (Ending.RAISED, "ForbiddenInWorker")


def test_formulas_are_compiled(sealed: WorkerPool) -> None:
    """As sympy does with numerals and with functions that it writes."""
    outcomes = sealed.run([("eval", "max (3 , 4.5 )"), ("eval", "(1 + 2)*3")])
    assert [outcome.value for outcome in outcomes] == [4.5, 9]


def test_an_unsealed_function_may_but_lets_no_file_grow(tmp_path: Path) -> None:
    pool = WorkerPool(ACT, 1, WorkerLimits(timeout_seconds=5, sealed=False))
    allowed = [("mkdir", str(tmp_path / "new")), ("thread", ""), ("eval", "open.__name__")]
    writing = [("open", str(tmp_path / "written")), ("shell", str(tmp_path / "shell"))]
    outcomes = pool.run(allowed)
    written, shell = pool.run(writing)
    pool.close()
    assert [outcome.ending for outcome in outcomes] == [Ending.RETURNED] * len(allowed)
    assert written.ending is Ending.RAISED
    assert shell.ending is Ending.RETURNED
    assert all(path.is_dir() or path.stat().st_size == 0 for path in tmp_path.iterdir())


HOSTILE = (
    r"__import__('os').system('touch {file}')",
    r"\int open('{file}','w') dx",
    r"\sum_{{k=1}}^{{exec('open(\"{file}\",\"w\")')}} k",
    r"\begin{{pmatrix}} \input{{{file}}} \end{{pmatrix}}",
    r"\write18{{touch {file}}}",
    r"\lim_{{x\to 0}} eval(x)",
    r"lambda: open('{file}','w')",
    r"\sqrt{{__class__.__base__}}",
    r"\prod_{{i=1}}^{{getattr(os,'system')('touch {file}')}} i",
)


def test_no_answer_runs(tmp_path: Path) -> None:
    """Neither through the verifier nor where Math-Verify is given what the verifier holds back."""
    texts = [text.format(file=tmp_path / "new") for text in HOSTILE]
    golds = ("1", r"\int_0^1 x dx", r"\begin{pmatrix} 1 \end{pmatrix}")
    with make_verifier("math") as verifier:
        verdicts = verifier.grade(
            [(rf"\boxed{{{text}}}", gold) for text in texts for gold in golds]
        )
    assert Verdict.CORRECT not in verdicts
    pool = WorkerPool("headwater.verify.algebra:judge_with_math_verify", 2)
    outcomes = pool.run([(text, text) for text in texts])
    pool.close()
    assert {outcome.ending for outcome in outcomes} <= {Ending.RETURNED, Ending.RAISED}
    assert _seen(tmp_path) == {}


def test_a_sealed_worker_still_imports_and_computes() -> None:
    items = [(r"\boxed{\int_0^2 x^2 dx}", r"\frac{8}{3}"), (r"\boxed{\sin(2y)}", r"2\sin y\cos y")]
    with make_verifier("math") as verifier:
        assert verifier.grade(items) == [Verdict.CORRECT] * 2


def test_the_pool_serves_threads_one_after_the_other(sealed: WorkerPool) -> None:
    values: list[object] = []
    threads = [
        threading.Thread(
            target=lambda text=str(number): values.extend(
                outcome.value for outcome in sealed.run([("echo", text)] * 20)
            )
        )
        for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(values) == sorted(str(number) for number in range(4) for _ in range(20))
